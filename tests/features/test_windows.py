"""FEATURES A.3: windows, causality and how queries and keys are aligned."""

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ringattn import Documents, Layout, Mask, MeshShape, parallel_attention
from ringattn.kernels import registry, selftest
from ringattn.kernels.backends import torch_flash
from ringattn.kernels.backends.flex import FlexAttention
from ringattn.kernels.backends.reference import Reference
from ringattn.kernels.spec import Backend, Block, Call, Grads, Options
from ringattn.names import canonical
from tests.dense import Case, dense_attention
from tests.hf import one_layer as hf
from tests.kernels.backends.test_conformance import present
from tests.parallel.ranks import attend
from tests.pool import Pools

NAMES = tuple(inspect.signature(parallel_attention).parameters)
DOCS = Documents([12, 8])
LAYOUT = Layout(DOCS, MeshShape())
EAGER = "flex, eager"


def backend_of(name: str) -> Backend:
    return FlexAttention(block_size=(16, 16), eager=True) if name == EAGER else registry.backends()[name]


def tensors(tokens: int = 20, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(tokens, heads, 8, generator=generator, dtype=dtype) for heads in (4, 2, 2))
    return q, k, v


def dense(allowed: Tensor, scale: float = 8**-0.5) -> Tensor:
    """Attention of `tensors()` over the allowed pairs (T, T)."""
    q, k, v = tensors(len(allowed))
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * scale
    return torch.einsum(
        "hqk,khv->qhv", scores.masked_fill(~allowed, float("-inf")).softmax(-1), v.repeat_interleave(2, 1)
    )


def distance(docs: Documents) -> tuple[Tensor, Tensor]:
    """q - k of every pair, and whether it is of one document."""
    place = torch.arange(docs.total)
    return place[:, None] - place[None, :], docs.dense(Mask(causal=False))


@given(tokens=st.integers(1, 9000))
def test_row_17_a_sliding_window_counts_the_query_itself(tokens: int) -> None:
    assert canonical({"sliding_window": tokens}, NAMES) == {"mask": Mask(window=(tokens - 1, 0))}
    assert canonical({"sliding_window": tokens, "mask": None}, NAMES) == {"mask": Mask(window=(tokens - 1, 0))}


def test_row_17_a_sliding_window_of_none_is_off() -> None:
    assert canonical({"sliding_window": None, "causal": False}, NAMES) == {"mask": Mask(causal=False)}


@pytest.mark.parametrize(("kwargs", "told"), [({"window": 4}, "window"), ({"sliding_window": 0}, "sliding_window")])
def test_row_17_a_bare_number_is_no_window(kwargs: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        canonical(kwargs, NAMES)


def test_row_17_three_tokens_are_the_query_and_two_before() -> None:
    mask = canonical({"sliding_window": 3}, NAMES)["mask"]
    rows = ["".join(".#"[int(seen)] for seen in row) for row in mask.dense(6).tolist()]
    assert rows == ["#.....", "##....", "###...", ".###..", "..###.", "...###"]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_row_17_one_token_is_the_value_itself(backend: str) -> None:
    q, k, v = tensors()
    out = parallel_attention(q, k, v, LAYOUT, sliding_window=1, backend=backend)
    torch.testing.assert_close(out, v.repeat_interleave(2, 1), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("window", [1, 2, 5])
def test_row_17_the_gradient_ends_at_the_window(backend: str, window: int) -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    query = 10
    parallel_attention(q, k, v, LAYOUT, sliding_window=window, backend=backend)[query].square().sum().backward()
    inside = torch.zeros(20, dtype=torch.bool)
    inside[query - window + 1 : query + 1] = True
    for grad in (k.grad, v.grad):
        assert grad is not None
        assert (grad[~inside] == 0).all()
        if window > 1 or grad is v.grad:  # of one key the probability is 1 whatever its score is
            assert (grad[inside].abs().amax((1, 2)) > 1e-6).all()


def test_row_18_a_bidirectional_sliding_window_is_ambiguous_and_refused() -> None:
    with pytest.raises(TypeError, match=r"'sliding_window'.*'causal'"):
        canonical({"sliding_window": 4, "causal": False}, NAMES)


def layer(keywords: dict[str, Any], causal: bool = True) -> Tensor:
    return hf.interface(DOCS, tensors(), keywords, causal)[0]


@pytest.mark.parametrize("size", [1, 4])
def test_row_18_a_bidirectional_window_of_a_model_is_exclusive(pool: Pools, size: int) -> None:
    """Its keyword arrives as |q - k| < size."""
    got = pool(1).run(layer, {"sliding_window": size, "is_causal": False})[0]
    far, same = distance(DOCS)
    torch.testing.assert_close(got, dense(same & (far.abs() < size)), rtol=1e-12, atol=1e-12)
    if size > 1:
        assert not torch.allclose(got, dense(same & (far.abs() <= size)), atol=1e-3)


@pytest.mark.parametrize(
    ("mask", "emitted"),
    [
        (Mask(causal=False), (False, -1, -1)),
        (Mask(), (True, -1, 0)),
        (Mask(window=(4, -1)), (True, 4, 0)),
        (Mask(window=(4, 9)), (True, 4, 0)),
        (Mask(causal=False, window=(4, 2)), (False, 4, 2)),
        (Mask(window=[4, 0]), (True, 4, 0)),  # type: ignore[arg-type]
    ],
    ids=str,
)
def test_row_19_what_torchs_kernel_is_told(
    monkeypatch: pytest.MonkeyPatch, mask: Mask, emitted: tuple[bool, int, int]
) -> None:
    """Both sides, always, and whether the corner is causal; of the band that the planner made of the mask."""
    torch_flash._one_split()
    told: list[tuple[bool, int, int]] = []

    def forward(q: Tensor, *args: Any, scale: float, window_size_left: int, window_size_right: int, **_: Any) -> Any:
        told.append((args[7], window_size_left, window_size_right))
        return torch.zeros_like(q), torch.zeros(q.shape[1], q.shape[0])

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch_flash.TorchFlash, "capability", Reference.capability)
    monkeypatch.setattr(selftest, "failure", lambda backend, spec: None)
    registry._chosen.cache_clear()
    parallel_attention(*tensors(), Layout(DOCS, MeshShape()), mask=mask, backend="torch")
    registry._chosen.cache_clear()
    assert set(told) == {emitted}


@pytest.mark.parametrize(("name", "device"), [*present(), (EAGER, "cpu")])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (6, 2), (8, 1)])
def test_row_20_fewer_key_heads_run_unrepeated(name: str, device: str, heads: int, key_heads: int) -> None:
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
    torch.testing.assert_close(*outs, rtol=1e-2, atol=1e-2 if dtype.itemsize < 4 else 1e-5)


@pytest.mark.parametrize(
    ("system", "given", "causal", "window", "tokens"),
    [
        ("transformers", 4, True, (3, 0), 4),
        ("transformers", 4, False, (3, 3), 7),
        ("FlashAttention", (4, 0), True, (4, 0), 5),
        ("FlashAttention", (4, 2), False, (4, 2), 7),
        ("ejkernel", 4, True, (4, 0), 5),
        ("ejkernel", 4, False, (4, 4), 9),
        ("ejkernel", (4, 2), False, (4, 2), 7),
    ],
)
def test_row_21_windows_of_other_systems(
    system: str, given: Any, causal: bool, window: tuple[int, int], tokens: int
) -> None:
    """The table in `Mask`, and how many keys a query far from both ends sees. The systems' own rules are spelt out."""
    rules = {
        "transformers": lambda far: (far < given) & (far > (-1 if causal else -given)),
        "FlashAttention": lambda far: (far <= given[0]) & (-far <= given[1]),
        "ejkernel": lambda far: (
            (far <= given) & (-far <= (0 if causal else given))
            if isinstance(given, int)
            else (far <= given[0]) & (-far <= given[1])
        ),
    }
    place = torch.arange(30)
    allowed = rules[system](place[:, None] - place[None, :])
    assert allowed[15].sum() == tokens
    assert torch.equal(Mask(causal, window).dense(30), allowed)
    assert system in (Mask.__doc__ or "")


def test_row_21_negative_sides_are_refused_and_zero_is_a_window() -> None:
    with pytest.raises(ValueError, match="window must be a pair"):
        Mask(window=(-2, 0))
    assert Mask(window=(0, 0)).dense(5).sum() == 5  # where ejkernel's Triton kernel means none


@pytest.mark.parametrize(("ring", "ulysses", "scheme"), [(4, 1, "gather"), (4, 1, "ring"), (2, 2, "hybrid")])
def test_row_22_a_window_longer_than_a_share_is_applied(pool: Pools, ring: int, ulysses: int, scheme: str) -> None:
    """16 tokens a rank, a window of 40, a document of 64: what one device computes, which full attention is not."""
    case = Case(Documents([64]), Mask(window=(39, 0)), (4, 2))
    expected = dense_attention(case)
    full = dense_attention(Case(Documents([64]), Mask(), (4, 2)))
    for got in pool(4).run(attend, case, ring, ulysses, "contiguous", scheme):
        for name, reference in expected.items():
            torch.testing.assert_close(got[name], reference, rtol=1e-12, atol=1e-12)
            assert not torch.allclose(got[name], full[name], atol=1e-3)


@pytest.mark.parametrize(("name", "device"), [*present(), (EAGER, "cpu")])
@pytest.mark.parametrize(("queries", "keys"), [(5, 9), (9, 5), (1, 9), (9, 1)])
def test_row_23_causal_blocks_are_aligned_to_the_last_query_and_key(
    name: str, device: str, queries: int, keys: int
) -> None:
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
    backend.backward(torch.ones_like(out), q, k, v, out, lse, call, Options(0.125), grads)
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2 if dtype.itemsize < 4 else 1e-5)
    empty = slice(0, max(0, queries - keys))
    assert (out[empty] == 0).all()
    assert lse[:, empty].eq(float("-inf")).all()
    assert lse[:, empty.stop :].isfinite().all()
    assert (grads.dq[empty] == 0).all()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(("name", "rows"), [("q", slice(19, 20)), ("k", slice(0, 7)), ("v", slice(0, 7))])
def test_row_24_queries_and_keys_of_different_lengths_are_refused(name: str, rows: slice) -> None:
    x = dict(zip("qkv", tensors(), strict=True))
    x[name] = x[name][rows]
    with pytest.raises(ValueError, match=f"{name} must hold the 20 tokens .* got {rows.stop - rows.start}"):
        parallel_attention(*x.values(), LAYOUT)


@pytest.mark.parametrize(("keyword", "attribute"), [(False, True), (None, False), (True, False), (None, True)])
def test_row_25_a_model_is_causal_by_its_keyword_or_else_by_its_layer(
    pool: Pools, keyword: bool | None, attribute: bool
) -> None:
    got = pool(1).run(layer, {} if keyword is None else {"is_causal": keyword}, attribute)[0]
    causal = attribute if keyword is None else keyword
    torch.testing.assert_close(got, dense(DOCS.dense(Mask(causal=causal))), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scheme", ["ring", "gather"])
def test_row_25_a_ring_need_not_be_causal(pool: Pools, scheme: str) -> None:
    case = Case(Documents([33, 7]), Mask(causal=False), (4, 2))
    for got in pool(2).run(attend, case, 2, 1, "balanced", scheme):
        for name, reference in dense_attention(case).items():
            torch.testing.assert_close(got[name], reference, rtol=1e-12, atol=1e-12)


def by_chunks(docs: Documents, chunk: int) -> Tensor:
    """Pairs of one document and one chunk of it, causal."""
    place = torch.cat([torch.arange(length) for length in docs.lengths])
    return docs.dense(Mask()) & (place[:, None] // chunk == place[None, :] // chunk)


def test_row_26_a_chunk_is_attended_alone_and_starts_with_its_document() -> None:
    got = parallel_attention(*tensors(), LAYOUT, mask=Mask(chunk=8))
    expected = dense(by_chunks(DOCS, 8))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    ignored = parallel_attention(*tensors(), LAYOUT)
    assert (ignored - expected).abs().max() > 0.1


def test_row_26_a_llama4_of_chunks_is_each_document_alone(pool: Pools) -> None:
    """And its chunks are seen: with others, or none, its logits are different."""
    config = {"head_dim": 16, "num_local_experts": 2, "num_hidden_layers": 4, "intermediate_size_mlp": 96}
    logits = []
    for chunk in (8, 64):
        chosen = config | {"attention_chunk_size": chunk}
        together, alone = pool(1).run(hf.run_model, "Llama4ForCausalLM", chosen, {})[0]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
        logits.append(together)
    assert (logits[0] - logits[1]).abs().max() > 1e-2
