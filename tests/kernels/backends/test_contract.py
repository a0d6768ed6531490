"""What every backend promises beside right results: signatures, alignment, the log-sum-exp, and parts that add up."""

import inspect

import pytest
import torch
from torch import Tensor

from ringattn.kernels import registry
from ringattn.kernels.backends.flex import FlexAttention
from ringattn.kernels.spec import Backend, Block, Call, Grads, Options, SavedCall
from tests.dense import relative_error
from tests.kernels.backends.test_conformance import TOLERANCE, present
from tests.small_tensors import tensors

EAGER = "flex, eager"


def backend_of(name: str) -> Backend:
    return FlexAttention(block_size=(16, 16), eager=True) if name == EAGER else registry.backends()[name]


@pytest.mark.parametrize("backend", registry.builtin(), ids=lambda backend: backend.name)
def test_backends_have_the_signatures_of_the_contract(backend: Backend) -> None:
    assert registry.defect_of(backend) is None
    for name in ("missing", "forward", "backward"):
        wanted = [*inspect.signature(getattr(Backend, name)).parameters.values()][1:]
        got = [*inspect.signature(getattr(backend, name)).parameters.values()]
        assert [(x.name, x.kind, x.default) for x in got] == [(x.name, x.kind, x.default) for x in wanted]


@pytest.mark.parametrize(("name", "device"), [*present(), (EAGER, "cpu")])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (6, 2), (8, 1)])
def test_fewer_key_heads_run_unrepeated(name: str, device: str, heads: int, key_heads: int) -> None:
    backend = backend_of(name)
    dtype = (backend.capability.dtypes or (torch.float32,))[-1]
    q, k, v = (torch.randn(40, n, 64, device=device, dtype=dtype) for n in (heads, key_heads, key_heads))
    call = Call((Block((0, 40), (0, 40), -1, 0),), -1, 0)
    outs = []
    for keys, values in (
        (k, v),
        (k.repeat_interleave(heads // key_heads, 1), v.repeat_interleave(heads // key_heads, 1)),
    ):
        outs.append(torch.empty_like(q))
        backend.forward(q, keys, values, call, Options(0.125), outs[-1])
    assert relative_error(outs[0], outs[1].double()) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("name", "device"), [*present(), (EAGER, "cpu")])
@pytest.mark.parametrize(("queries", "keys"), [(5, 9), (9, 5), (1, 9), (9, 1)])
def test_causal_blocks_are_aligned_to_the_last_query_and_key(name: str, device: str, queries: int, keys: int) -> None:
    backend = backend_of(name)
    dtype = (backend.capability.dtypes or (torch.float32,))[-1]
    q, k, v = (torch.randn(n, 2, 64, device=device, dtype=dtype) for n in (queries, keys, keys))
    place = torch.arange(queries, device=device)[:, None] + keys - queries
    allowed = torch.arange(keys, device=device)[None, :] <= place
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * 0.125
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num()
    expected = torch.einsum("hqk,khv->qhv", weights, v.double())
    call = Call((Block((0, queries), (0, keys), -1, 0),), -1, 0)
    out, grads = torch.full_like(q, 7.0), Grads(*(torch.full_like(x, 7.0) for x in (q, k, v)))
    lse = backend.forward(q, k, v, call, Options(0.125), out)
    backend.backward(torch.ones_like(out), SavedCall(q, k, v, out, lse, call, Options(0.125)), grads)
    assert relative_error(out, expected) <= TOLERANCE[dtype]
    empty = slice(0, max(0, queries - keys))
    assert (out[empty] == 0).all()
    assert lse[:, empty].eq(float("-inf")).all()
    assert lse[:, empty.stop :].isfinite().all()
    assert (grads.dq[empty] == 0).all()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(("name", "device"), [*present(), ("flex, eager", "cpu")])
def test_the_lse_is_natural_wide_and_heads_first(name: str, device: str) -> None:
    """Of scores that are all 0 it is the natural logarithm of the number of keys; of no keys it is -inf."""
    backend = FlexAttention(eager=True) if name == "flex, eager" else registry.backends()[name]
    # float32 where it can be: in half precision torch's CPU kernel approximates exp on some processors (lse 5e-5 off).
    dtype = (backend.capability.dtypes or (torch.float32,))[-1]
    heads, keys, rows = 4, [1, 3, 10, 0], [2, 2, 2, 1]
    blocks = [Block((sum(rows[:i]), sum(rows[: i + 1])), (sum(keys[:i]), sum(keys[: i + 1]))) for i in range(len(keys))]
    q = torch.zeros(sum(rows), heads, 64, device=device, dtype=dtype)
    k, v = (torch.ones(sum(keys), 2, 64, device=device, dtype=dtype) for _ in range(2))
    out = torch.full_like(q, 7.0)
    lse = backend.forward(q, k, v, Call(tuple(blocks)), Options(0.125), out)
    assert lse.shape == (heads, sum(rows))
    assert lse.dtype == torch.float32
    expected = torch.tensor([float(n) for n, r in zip(keys, rows, strict=True) for _ in range(r)], device=device).log()
    torch.testing.assert_close(lse, expected.expand(heads, -1), rtol=1e-5, atol=1e-5)
    assert (out[-1] == 0).all()
    torch.testing.assert_close(out[:-1], torch.ones_like(out[:-1]), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_partial_results_are_made_of_out_and_lse(backend: str) -> None:
    """The unnormalised sums of two halves of the keys add up to those of all keys."""
    q, k, v = tensors()
    chosen = registry.backends()[backend]

    def sums(keys: slice) -> tuple[Tensor, Tensor]:
        call = Call((Block((0, 20), (0, keys.stop - keys.start)),))
        out = torch.empty_like(q)
        lse = chosen.forward(q, k[keys], v[keys], call, Options(8**-0.5), out)
        return lse.exp(), out * lse.exp().T[..., None]

    whole, first, second = sums(slice(0, 20)), sums(slice(0, 7)), sums(slice(7, 20))
    for all_keys, a, b in zip(whole, first, second, strict=True):
        torch.testing.assert_close(a + b, all_keys, rtol=1e-12, atol=1e-12)
