"""Adapters of packages and devices that are not here, against fakes: what they pass and what they make of answers."""

import gc

import pytest
import torch
from torch import Tensor

from ringattn.kernels.backends import counted, fa2, fa3, npu, torch_flash, xpu
from ringattn.kernels.spec import Backend, Block, Call, Grads, Options, SavedCall
from tests.caches import clear_caches
from tests.kernels.backends import fakes

pytestmark = pytest.mark.usefixtures("fresh_caches")

# Rows (queries, keys) of blocks that start at row 3 of the queries and 2 of the keys; `None` skips keys.
LENGTHS = {
    "dense": [(5, 5), (1, 9), (7, 12)],
    "gaps": [(5, 5), (None, 3), (4, 9), (None, 2), (1, 1)],
    "keyless": [(5, 5), (9, 4), (3, 0), (None, 2), (2, 6)],
    "no keys at all": [(9, 4), (3, 0)],
}
BANDS = [(-1, 0), (-1, -1), (4, 0), (4, 2), (2, -1), (-1, 1), (40, 40)]
PLAIN = [(-1, 0), (-1, -1)]
SCALE = 0.3


@pytest.fixture
def record() -> fakes.Record:
    return []


@pytest.fixture
def fake_fa2(monkeypatch: pytest.MonkeyPatch, record: fakes.Record) -> Backend:
    kernels = fakes.fa2(record)
    monkeypatch.setattr(fa2, "_kernels", lambda: kernels)
    return fa2.FlashAttention2()


def make_call(lengths: list[tuple[int | None, int]], band: tuple[int, int]) -> Call:
    blocks, q, k = [], 3, 2
    for queries, keys in lengths:
        if queries is not None:
            blocks.append(Block((q, q + queries), (k, k + keys)))
            q += queries
        k += keys
    return Call(tuple(blocks), *band)


def check(backend: Backend, call: Call, softcap: float = 0.0, value_dim: int = 8) -> None:
    """Against the reference, forward and backward, into views of larger buffers."""
    rows, keys = call.q[1] - call.q[0], call.k[1] - call.k[0]
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, 4, value_dim), (rows, 4, 8), (keys, 2, 8), (keys, 2, value_dim), (rows, 4, value_dim)]
    dout, q, k, v, whole_out = (torch.randn(shape, generator=generator) for shape in shapes)
    options = Options(SCALE, softcap, deterministic=True)
    out = guarded(dout)
    lse = backend.forward(q, k, v, call, options, out)
    expected_out, expected_lse = fakes.attend(q, k, v, call, SCALE, softcap)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, expected_lse)
    torch.testing.assert_close(out, expected_out)
    whole = expected_lse + 0.5  # of a softmax of which this call is a part; rows without any key stay at -inf
    grads = Grads(guarded(q), guarded(k), guarded(v))
    backend.backward(dout, SavedCall(q, k, v, whole_out, whole, call, options), grads)
    expected = fakes.gradients((dout, q, k, v, whole_out), whole, call, SCALE, softcap)
    read = torch.cat([torch.arange(0), *(torch.arange(*run) - call.k[0] for run in call.key_runs)])
    torch.testing.assert_close(grads.dq, expected.dq)
    for got, wanted in zip(grads.tensors[1:], expected.tensors[1:], strict=True):
        torch.testing.assert_close(got[read], wanted[read])
    for x in (out, *grads):
        edges = x._base[[0, -1]]
        assert edges.isnan().all()


def guarded(x: Tensor) -> Tensor:
    """A view between rows of NaN."""
    return x.new_full((x.shape[0] + 2, *x.shape[1:]), float("nan"))[1:-1]


@pytest.fixture
def fake_torch_flash(monkeypatch: pytest.MonkeyPatch, record: fakes.Record) -> Backend:
    """torch's operators with the windows of the kernel inside, which is FlashAttention-2's."""
    fa2_forward, fa2_backward = fakes.fa2(record)
    names = "_flash_attention_forward", "_flash_attention_backward"
    schema = getattr(torch.ops.aten, names[0]).default

    def forward(
        q, k, v, cu_q, cu_k, max_q, max_k, p, causal, debug, *, scale, window_size_left, window_size_right, **_
    ):
        sides = window_size_left, window_size_right
        out, lse, *_ = fa2_forward(q, k, v, cu_q, cu_k, max_q, max_k, p, scale, causal, *sides)
        return out, lse, None, None, None

    def backward(
        dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, p, causal, *_, scale, window_size_left, window_size_right
    ):  # fmt: skip
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        lse = lse.masked_fill(lse == -float("inf"), float("inf"))  # the kernel inside torch takes both
        sides = window_size_left, window_size_right
        lengths = cu_q, cu_k, max_q, max_k
        fa2_backward(dout, q, k, v, out, lse, *grads, *lengths, p, scale, causal, *sides, 0.0, None, False)
        return grads

    forward.default = schema  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.ops.aten, names[0], forward)
    monkeypatch.setattr(torch.ops.aten, names[1], backward)
    return torch_flash.TorchFlash()


@pytest.mark.parametrize("lengths", list(LENGTHS)[:3])
@pytest.mark.parametrize("band", BANDS)
def test_torchs_kernel_gets_what_it_takes_and_is_right(
    fake_torch_flash: Backend, band: tuple[int, int], lengths: str
) -> None:
    """An open side beside a closed one must reach all keys, also where a block has more queries than keys."""
    check(fake_torch_flash, make_call(LENGTHS[lengths], band))


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("kernel", ["fake_fa2", "fake_torch_flash"])
def test_more_sums_than_an_int32_counts_are_added_up_for_some_heads_at_a_time(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    record: fakes.Record,
    kernel: str,
    heads: int,
) -> None:
    """Of four heads, two to a key head: one, two and three that can be counted make four, two and two calls."""
    call = make_call(LENGTHS["gaps"], (-1, 0))
    rows = call.q[1] - call.q[0] + counted.PADDING * len(call.blocks)
    monkeypatch.setattr(counted, "COUNTED", rows * counted.ROUNDED * heads + 1)
    check(request.getfixturevalue(kernel), call)
    calls = [one for one in record if "dq" in one]
    assert [one["q"].shape[1] for one in calls] == {1: [1] * 4, 2: [2, 2], 3: [2, 2]}[heads]
    assert {one["k"].shape[1] for one in calls} == {1}


@pytest.mark.parametrize("lengths", list(LENGTHS)[:3])
@pytest.mark.parametrize("band", BANDS)
def test_fa2_gets_what_it_takes_and_is_right(
    fake_fa2: Backend, record: fakes.Record, band: tuple[int, int], lengths: str
) -> None:
    call = make_call(LENGTHS[lengths], band)
    check(fake_fa2, call)
    check(fake_fa2, call, softcap=1.5)
    forward, backward = record[-2:]
    assert (forward["softmax_scale"], forward["softcap"], forward["dropout_p"]) == (SCALE, 1.5, 0.0)
    assert forward["max_seqlen_q"] == call.max_q
    assert forward["alibi_slopes"] is None
    assert backward["deterministic"] is True
    assert len(forward["k"]) == sum(call.k_lens)  # packed


@pytest.mark.parametrize("names", [("out", "is_causal"), ("out_", "causal")])
@pytest.mark.parametrize("lengths", list(LENGTHS)[:3])
def test_fa3_gets_what_it_takes_and_is_right(record: fakes.Record, names: tuple[str, str], lengths: str) -> None:
    with Operators(record, *names):
        backend = fa3.FlashAttention3()
        assert backend.missing() is None
        for band in BANDS:
            call = make_call(LENGTHS[lengths], band)
            check(backend, call, value_dim=4)
            check(backend, call, softcap=1.5)
            assert (record[-2].get("seqused_k") is None) == call.dense_keys
            assert record[-1]["deterministic"] is True


class Operators:
    """`torch.ops.flash_attn_3` for as long as the context lasts."""

    def __init__(self, record: fakes.Record, *names: str, softcap: bool = True) -> None:
        if hasattr(torch.ops.flash_attn_3, "fwd"):
            pytest.skip("FlashAttention-3 is loaded in this process")
        self.arguments = record, *names
        self.softcap = softcap

    def __enter__(self) -> None:
        self.library = fakes.fa3(*self.arguments, softcap=self.softcap)

    def __exit__(self, *error: object) -> None:
        clear_caches()
        self.library._destroy()
        for name in ("fwd", "bwd"):
            torch.ops.flash_attn_3.__dict__.pop(name, None)
        gc.collect()


@pytest.mark.parametrize("says_layout", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_npu_gets_what_it_takes_and_is_right(
    monkeypatch: pytest.MonkeyPatch, record: fakes.Record, says_layout: bool, lengths: str
) -> None:
    kernels = npu._Kernels(*fakes.npu(record, says_layout), says_layout)
    monkeypatch.setattr(npu, "_kernels", lambda: kernels)
    for band in BANDS:
        check(npu.NpuFusion(), make_call(LENGTHS[lengths], band))
        assert all(launch["mode"] == {(-1, 0): 3, (-1, -1): 0}.get(band, 4) for launch in record[-2:])
    check(npu.NpuFusion(), make_call([(3, 0), (2, 0), (None, 4)], (-1, 0)))
    with pytest.raises(NotImplementedError, match="up to 2048 blocks in a call, got 2049"):
        check(npu.NpuFusion(), make_call([(1, 1)] * 2049, (-1, 0)))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_xpu_gets_what_it_takes_and_is_right(
    monkeypatch: pytest.MonkeyPatch, record: fakes.Record, lengths: str
) -> None:
    kernels = fakes.xpu(record)
    monkeypatch.setattr(xpu, "_kernels", lambda: kernels)
    for band in PLAIN:
        check(xpu.XpuFlash(), make_call(LENGTHS[lengths], band))
    with pytest.raises(NotImplementedError, match="no window"):
        check(xpu.XpuFlash(), make_call(LENGTHS[lengths], (4, 0)))
