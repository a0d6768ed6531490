"""What each variable-length kernel is given for a call: every argument, by name, against values written out here."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ringattn.kernels.backends import fa2, fa3, fa4, torch_flash
from ringattn.kernels.spec import Backend, Block, Call, Grads, Options, SavedCall

Q_ENDS, KEYS = [0, 5, 14], [0, 5, 12]  # of blocks of 5 queries and keys and of 9 queries and 7 keys
DENSE = (Block((3, 8), (2, 7)), Block((8, 17), (7, 14)))
GAPS = (Block((3, 8), (2, 7)), Block((8, 17), (10, 17)))  # three key rows between that no block reads
SCALE, SOFTCAP = 0.3, 1.5
# Band of a call -> whether it is causal to kernels that read keys in place, and to those with packed keys.
BANDS = {(-1, 0): (True, True), (-1, -1): (False, False), (4, 0): (False, True), (4, 2): (False, False)}
LONGEST = 9  # packed: not fewer keys than queries


class Recorder:
    """A kernel that computes nothing and knows what it was given."""

    def __init__(self, result: Any = None) -> None:
        self.result, self.positional, self.named = result, (), {}

    def __call__(self, *positional: Any, **named: Any) -> Any:
        self.positional, self.named = positional, named
        return self.result


class Given:
    """A backend's two kernels after a forward and a backward pass, and the tensors of the call."""

    def __init__(self, backend: Backend, kernels: tuple[Recorder, Recorder], call: Call) -> None:
        rows, keys = call.q[1] - call.q[0], call.k[1] - call.k[0]
        self.q, self.dout, self.out = (torch.rand(rows, 4, 8) for _ in range(3))
        self.k, self.v = (torch.rand(keys, 2, 8) for _ in range(2))
        self.grads = Grads(torch.zeros_like(self.q), torch.zeros_like(self.k), torch.zeros_like(self.v))
        self.lse = torch.rand(4, rows)
        options = Options(SCALE, SOFTCAP, deterministic=True)
        backend.forward(self.q, self.k, self.v, call, options, self.out)
        saved = SavedCall(self.q, self.k, self.v, self.out, self.lse, call, options)
        backend.backward(self.dout, saved, self.grads)
        self.forward, self.backward = kernels


def plain(named: dict[str, Any]) -> dict[str, Any]:
    """Lengths as lists; other tensors are compared by identity elsewhere."""
    lists = {name: x.tolist() for name, x in named.items() if isinstance(x, Tensor) and x.dtype == torch.int32}
    return {name: x for name, x in named.items() if not isinstance(x, Tensor)} | lists


@pytest.fixture(params=[DENSE, GAPS], ids=["dense", "gaps"])
def blocks(request: pytest.FixtureRequest) -> tuple[Block, ...]:
    return request.param


@pytest.mark.parametrize("band", BANDS)
def test_fa2(monkeypatch: pytest.MonkeyPatch, blocks: tuple[Block, ...], band: tuple[int, int]) -> None:
    kernels = Recorder((torch.zeros(14, 4, 8), torch.zeros(4, 14))), Recorder()
    monkeypatch.setattr(fa2, "_kernels", lambda: kernels)
    given = Given(fa2.FlashAttention2(), kernels, Call(blocks, *band))
    common = {
        "cu_seqlens_q": Q_ENDS, "cu_seqlens_k": KEYS, "max_seqlen_q": 9, "max_seqlen_k": LONGEST, "dropout_p": 0.0,
        "softmax_scale": SCALE, "causal": BANDS[band][1], "window_size_left": band[0], "window_size_right": band[1],
        "softcap": SOFTCAP, "alibi_slopes": None,
    }  # fmt: skip
    assert plain(given.forward.named) == common | {"return_softmax": False}
    assert plain(given.backward.named) == common | {"deterministic": True}
    dout, q, k, v, out, lse = given.backward.positional
    assert (dout is given.dout, q is given.q, out is given.out, torch.equal(lse, given.lse)) == (True,) * 4
    assert len(k) == len(v) == len(given.backward.named["dk"]) == KEYS[-1]
    assert given.backward.named["dq"] is given.grads.dq
    assert (given.backward.named["dk"] is given.grads.dk) == (blocks is DENSE)


@pytest.mark.parametrize("band", BANDS)
def test_torch_flash(monkeypatch: pytest.MonkeyPatch, blocks: tuple[Block, ...], band: tuple[int, int]) -> None:
    packed = [torch.ones(14, 4, 8), torch.ones(12, 2, 8), torch.ones(12, 2, 8)]
    kernels = Recorder((torch.zeros(14, 4, 8), torch.zeros(4, 14))), Recorder(packed)
    monkeypatch.setattr(torch_flash, "_one_split", lambda: {"num_splits": 1})
    for name, kernel in zip(("_flash_attention_forward", "_flash_attention_backward"), kernels, strict=True):
        monkeypatch.setattr(torch.ops.aten, name, kernel)
    given = Given(torch_flash.TorchFlash(), kernels, Call(blocks, *band))
    window = {"scale": SCALE, "window_size_left": band[0], "window_size_right": band[1]}
    lengths = [Q_ENDS, KEYS, 9, LONGEST, 0.0, BANDS[band][1]]
    assert given.forward.named == window | {"num_splits": 1}
    assert [listed(x) for x in given.forward.positional[3:]] == [*lengths, False]
    assert given.backward.named == window
    assert [listed(x) for x in given.backward.positional[6:12]] == lengths
    assert given.backward.positional[1] is given.q
    assert given.backward.positional[4] is given.out
    assert len(given.backward.positional) == 14
    read = torch.zeros(len(given.k), dtype=torch.bool)
    for block in blocks:
        read[block.k[0] - 2 : block.k[1] - 2] = True
    assert torch.equal(given.grads.dk[:, 0, 0] == 1, read)


def listed(x: Any) -> Any:
    return x.tolist() if isinstance(x, Tensor) else x


class Operators:
    """FlashAttention-3's, of a build with these names."""

    def __init__(self, out: str, causal: str) -> None:
        self.names = frozenset(
            f"cu_seqlens_q cu_seqlens_k seqused_k max_seqlen_q max_seqlen_k softmax_scale softcap window_size_left "
            f"window_size_right {out} {causal} num_splits dq dk dv deterministic".split()
        )


@pytest.fixture
def fresh_names() -> Iterator[None]:
    fa3._own_name.cache_clear()
    yield
    fa3._own_name.cache_clear()


@pytest.mark.parametrize(("out", "causal"), [("out", "is_causal"), ("out_", "causal")])
@pytest.mark.parametrize("band", BANDS)
def test_fa3(
    monkeypatch: pytest.MonkeyPatch, fresh_names: None, blocks: tuple[Block, ...], band: tuple[int, int], out: str,
    causal: str,
) -> None:  # fmt: skip
    kernels, build = (Recorder((None, None)), Recorder()), Operators(out, causal)
    monkeypatch.setattr(fa3, "_kernels", lambda: kernels)
    monkeypatch.setattr(fa3, "parameters", lambda operator: build.names)
    given = Given(fa3.FlashAttention3(), kernels, Call(blocks, *band))
    common = in_place(blocks) | {
        causal: BANDS[band][0], "softmax_scale": SCALE, "softcap": SOFTCAP, "window_size_left": band[0],
        "window_size_right": band[1],
    }  # fmt: skip
    assert plain(given.forward.named) == common | {"num_splits": 1}
    assert given.forward.named[out] is given.out
    assert plain(given.backward.named) == common | {"deterministic": True}
    assert all(given.backward.named[name] is getattr(given.grads, name) for name in ("dq", "dk", "dv"))
    dout, q, k, v, output, lse = given.backward.positional
    assert (dout is given.dout, q is given.q, k is given.k, v is given.v, output is given.out) == (True,) * 5
    assert torch.equal(lse, given.lse)


@pytest.mark.parametrize("band", BANDS)
def test_fa4(monkeypatch: pytest.MonkeyPatch, blocks: tuple[Block, ...], band: tuple[int, int]) -> None:
    kernels = Recorder((None, None)), Recorder()
    module = ModuleType("recorded_fa4")
    monkeypatch.setitem(sys.modules, "recorded_fa4", module)
    monkeypatch.setattr(fa4, "_kernels", lambda: kernels)
    kernels[1].__module__ = "recorded_fa4"
    given = Given(fa4.FlashAttention4(), kernels, Call(blocks, *band))
    window = {(-1, 0): (None, None), (-1, -1): (None, None), (4, 0): (4, 0), (4, 2): (4, 2)}[band]
    common = in_place(blocks) | {
        "causal": BANDS[band][0], "softmax_scale": SCALE, "softcap": SOFTCAP, "window_size_left": window[0],
        "window_size_right": window[1],
    }  # fmt: skip
    assert plain(given.forward.named) == common | {"return_lse": True}
    assert given.forward.named["out"] is given.out
    assert plain(given.backward.named) == common | {"deterministic": True}
    assert all(given.backward.named[name] is getattr(given.grads, name) for name in ("dq", "dk", "dv"))
    q, k, v, output, dout, lse = given.backward.positional
    assert (dout is given.dout, q is given.q, k is given.k, v is given.v, output is given.out) == (True,) * 5
    assert torch.equal(lse, given.lse)


def in_place(blocks: tuple[Block, ...]) -> dict[str, Any]:
    """Lengths for a kernel that reads keys where they lie: of GAPS, where they begin and how many they are."""
    dense = blocks is DENSE
    return {
        "cu_seqlens_q": Q_ENDS, "cu_seqlens_k": KEYS if dense else [0, 8, 15], "seqused_k": None if dense else [5, 7],
        "max_seqlen_q": 9, "max_seqlen_k": 7,
    }  # fmt: skip
