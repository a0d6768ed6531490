"""FlexAttention as a backend: its masks, its share of a larger softmax, and how often it compiles.

On CPU the operator runs without its kernel: masks, scores, gradients and tracing are torch's, the Triton code is not.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("torch.nn.attention.flex_attention")


import pytest

from ringattn.kernels.backends import flex
from ringattn.kernels.backends.flex import FlexAttention, block_mask, row_bounds, within_reach
from ringattn.kernels.backends.reference import Reference, allowed_pairs
from ringattn.kernels.backends.rows import as_batch
from ringattn.kernels.merge import finite_lse, merge_
from ringattn.kernels.selftest import failure, forget
from ringattn.kernels.spec import Block, Call, CallSpec, Dropout, Grads, Options, SavedCall
from tests.small_tensors import tensors

EAGER = FlexAttention(block_size=(16, 16), eager=True)
HEADS, KEY_HEADS, DIM, VALUE_DIM = 4, 2, 16, 8
BANDS = st.sampled_from([(-1, 0), (-1, -1), (0, 0), (7, 0), (-1, 5), (3, -1), (20, 9), (200, 200)])
# Per block: queries, keys, rows between its keys and those of the block before.
BLOCKS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60), st.integers(0, 9)), min_size=1, max_size=4)
SIGNATURES = [
    pytest.param((64, 64, 2), {}, id="plain"),
    pytest.param((64, 64, 2), {"window": True}, id="window"),
    pytest.param((64, 64, 1), {"softcap": 30.0}, id="softcap"),
    pytest.param((96, 64, 4), {"window": True}, id="unequal head dims"),
    pytest.param((64, 64, 2), {"dropout_p": 0.1}, id="dropout"),
    pytest.param((40, 24, 3), {"window": True, "softcap": 30.0, "deterministic": True}, id="all"),
]


def make_call(blocks: list[tuple[int, int, int]], band: tuple[int, int]) -> Call:
    made, q, k = [], 0, 0
    for number, (queries, keys, gap) in enumerate(blocks):
        k += gap if number else 0
        made.append(Block((q, q + queries), (k, k + keys), *band))
        q, k = q + queries, k + keys
    return Call(tuple(made), *band)


def dense(call: Call) -> Tensor:
    """(T, S) pairs that a call computes."""
    allowed = torch.zeros(call.q[1] - call.q[0], call.k[1] - call.k[0], dtype=torch.bool)
    for block, start in zip(call.blocks, call.k_starts, strict=True):
        rows = slice(block.q[0] - call.q[0], block.q[1] - call.q[0])
        inside = allowed_pairs(block, call.left, call.right, (0, block.q[1] - block.q[0]), allowed.device)
        allowed[rows, start : start + inside.shape[1]] = inside
    return allowed


def drawn(call: Call, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """q, k, v, dout"""
    generator = torch.Generator().manual_seed(seed)
    rows, keys = call.q[1] - call.q[0], call.k[1] - call.k[0]
    shapes = [(rows, HEADS, DIM), (keys, KEY_HEADS, DIM), (keys, KEY_HEADS, VALUE_DIM), (rows, HEADS, VALUE_DIM)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def both_ways(backend: Any, tensors: list[Tensor], call: Call, options: Options) -> list[Tensor]:
    """out, lse, dq, dk, dv of the keys that are read; -inf as 0 so that differences are numbers."""
    q, k, v, dout = tensors
    out = torch.full_like(dout, 7.0)
    lse = backend.forward(q, k, v, call, options, out)
    dq, dk, dv = (torch.full_like(x, 7.0) for x in (q, k, v))
    backend.backward(dout, SavedCall(q, k, v, out, lse, call, options), Grads(dq, dk, dv))
    read = torch.cat([torch.arange(0), *(torch.arange(*run) - call.k[0] for run in call.key_runs)]).to(k.device)
    return [out, lse, dq, dk[read], dv[read]]


def dropout_of(call: Call, p: float) -> Dropout | None:
    """At places of a larger stream, of which the call has the heads from the third on."""
    if not p:
        return None
    q_index, k_index = (torch.arange(*rows) + 5_000_011 for rows in (call.q, call.k))
    return Dropout(p, 9, q_index, k_index, 2)


@settings(max_examples=60)
@given(blocks=BLOCKS, band=BANDS)
def test_row_bounds_are_the_band(blocks, band) -> None:
    call = make_call(blocks, band)
    first, last = (x[:, None] for x in row_bounds(call))
    keys = torch.arange(call.k[1] - call.k[0])
    assert ((first <= keys) & (keys < last)).equal(dense(call))


@settings(max_examples=60)
@given(blocks=BLOCKS, band=BANDS, size=st.sampled_from([(16, 16), (8, 16), (16, 4)]))
def test_tiles_are_those_of_the_dense_mask(blocks, band, size) -> None:
    """As `create_block_mask` finds them by looking at every pair."""
    from torch.nn.attention.flex_attention import create_block_mask

    call = make_call(blocks, band)
    allowed = dense(call)
    if not allowed.shape[1]:
        return
    got = block_mask(call, size, allowed.device)
    wanted = create_block_mask(lambda b, h, i, j: allowed[i, j], None, None, *allowed.shape, "cpu", BLOCK_SIZE=size)
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, order = getattr(wanted, name + "_num_blocks"), getattr(wanted, name + "_indices")
        assert getattr(got, name + "_num_blocks").equal(counts), name
        listed = torch.arange(order.shape[-1]) < counts[..., None]
        assert getattr(got, name + "_indices")[listed].equal(order[listed]), name


def test_a_call_keeps_its_mask() -> None:
    call = make_call([(5, 5, 0)], (-1, 0))
    device = torch.device("cpu")
    assert block_mask(call, (16, 16), device) is block_mask(call, (16, 16), device)
    assert block_mask(call, (16, 16), device) is not block_mask(call, (32, 16), device)


@settings(max_examples=25)
@given(
    blocks=BLOCKS,
    band=BANDS,
    softcap=st.sampled_from([0.0, 1.5]),
    p=st.sampled_from([0.0, 0.2, 0.95]),  # the last leaves many rows without a key
    seed=st.integers(0, 1 << 20),
)
def test_results_are_those_of_the_reference(blocks, band, softcap, p, seed) -> None:
    """Documents, gaps between their keys, blocks without keys, rows that the band leaves without keys."""
    call = make_call(blocks, band)
    tensors = drawn(call, seed=seed)
    options = Options(0.3, softcap, dropout=dropout_of(call, p))
    for got, wanted in zip(
        both_ways(EAGER, tensors, call, options), both_ways(Reference(), tensors, call, options), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("band", [(-1, 0), (-1, -1)])
@pytest.mark.parametrize(("softcap", "p"), [(0.0, 0.0), (1.5, 0.0), (0.0, 0.3)])
def test_parts_of_a_softmax_add_up(band: tuple[int, int], softcap: float, p: float) -> None:
    """Two calls over two halves of the keys, backward with the out and lse of both, equal one call over all keys."""
    whole = Call((Block((0, 50), (0, 90), *band),), *band)
    halves = [Call((Block((0, 50), (0, 40)),)), Call((Block((0, 50), (40, 90), *band),), *band)]
    q, k, v, dout = drawn(whole)

    def options(call: Call) -> Options:
        return Options(0.3, softcap, dropout=dropout_of(call, p))

    wanted = both_ways(Reference(), [q, k, v, dout], whole, options(whole))
    out, lse = torch.zeros_like(dout), torch.full((HEADS, 50), float("-inf"), dtype=dout.dtype)
    for call in halves:
        rows, part = slice(*call.k), torch.empty_like(dout)
        merge_(out, lse, part, EAGER.forward(q, k[rows], v[rows], call, options(call), part))
    dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
    for call in halves:
        rows = slice(*call.k)
        grads = Grads(torch.empty_like(q), dk[rows], dv[rows])
        EAGER.backward(dout, SavedCall(q, k[rows], v[rows], out, lse, call, options(call)), grads)
        dq += grads.dq
    for got, exact in zip((out, lse, dq, dk, dv), wanted, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)


def test_bfloat16_part_of_a_softmax() -> None:
    """Rounding a part's cotangent costs no more than the kernel's own rounding does: errors against float64."""
    half, options = Call((Block((0, 200), (0, 150)),)), Options(0.3)
    q, k, v, dout = (x.bfloat16().double() for x in drawn(half))
    out, lse = torch.zeros_like(dout), torch.zeros(HEADS, 200, dtype=torch.float64)
    lse = Reference().forward(q, k, v, half, options, out) + 1.0  # other keys hold 1 - 1/e of the whole softmax
    out = (out / torch.e + 0.2 * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).bfloat16().double()
    wanted = Grads(*(torch.empty_like(x) for x in (q, k, v)))
    Reference().backward(dout, SavedCall(q, k, v, out, lse, half, options), wanted)
    narrow = [x.bfloat16() for x in (dout, q, k, v, out)]
    got = Grads(*(torch.empty_like(x) for x in narrow[1:4]))
    EAGER.backward(narrow[0], SavedCall(*narrow[1:], lse.float(), half, options), got)
    for x, exact in zip(got.tensors, wanted.tensors, strict=True):
        assert (x.double() - exact).norm() / exact.norm() < 6e-3


@pytest.mark.usefixtures("fresh_caches")  # "flex" is also the compiled one
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "features"), SIGNATURES)
def test_flex_passes_its_self_test(shape: tuple[int, int, int], features: dict[str, Any], dtype: torch.dtype) -> None:
    head_dim, value_dim, group = shape
    assert failure(EAGER, CallSpec("cpu", dtype, head_dim, value_dim, 2 * group, 2, **features)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "features"), SIGNATURES)
def test_the_compiled_kernel_passes_its_self_test(
    shape: tuple[int, int, int], features: dict[str, Any], dtype: torch.dtype
) -> None:
    head_dim, value_dim, group = shape
    spec = CallSpec("cuda", dtype, head_dim, value_dim, 2 * group, 2, **features)
    backend = FlexAttention()
    assert backend.capability.refusal(spec) is None
    assert backend.missing() is None
    assert failure(backend, spec) is None


@pytest.mark.gpu
def test_kernel_options_reach_the_kernel(fresh_caches: None) -> None:
    options = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32}
    backend = FlexAttention(kernel_options=options | {"num_warps": 4, "num_stages": 2})
    assert failure(backend, CallSpec("cuda", torch.bfloat16, 64, 64, 4, 2)) is None
    forget()
    wrong = FlexAttention(kernel_options={"BLOCK_M": 48})  # does not divide the tiles of the mask: torch must say so
    assert failure(wrong, CallSpec("cuda", torch.bfloat16, 64, 64, 4, 2)) is not None


def test_rows_beyond_the_reach_of_int32_are_copied_head_by_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "COUNTED", 40 * 16 * 4)
    x = torch.randn(40, 4, 16)
    (view,) = as_batch(x)
    assert within_reach(view) is view
    (longer,) = as_batch(torch.cat([x, x[:1]]))
    copy = within_reach(longer)
    assert torch.equal(copy, longer)
    assert copy.shape[2] * copy.stride(2) == 41 * 16
    with pytest.raises(NotImplementedError, match="161 rows of 16"):
        within_reach(as_batch(torch.empty(161, 4, 16))[0])


def test_beyond_the_reach_of_int32_all_results_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    call, options = make_call([(30, 30, 0), (25, 33, 2)], (-1, 0)), Options(DIM**-0.5)
    shapes = (55, HEADS, DIM), (65, KEY_HEADS, DIM), (65, KEY_HEADS, DIM), (55, HEADS, DIM)
    x = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    plain = both_ways(EAGER, x, call, options)
    monkeypatch.setattr(flex, "COUNTED", 70 * DIM)
    for found, expected in zip(both_ways(EAGER, x, call, options), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_declares_what_it_can_do() -> None:
    asked = CallSpec("cpu", torch.bfloat16, 64, 64, 4, 2)
    assert "cuda" in (FlexAttention().capability.refusal(asked) or "")
    assert EAGER.capability.refusal(asked) is None
    assert EAGER.capability.refusal(CallSpec("cpu", torch.bfloat16, 64, 64, 4, 2, dropout_p=0.1)) is None


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch, fresh_caches: None) -> Any:
    """The compiled path on CPU, without a kernel: traced whole, with gradients, and counted."""
    import torch._dynamo
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch.nn.attention import flex_attention

    counting, compile_ = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=counting, **options))
    torch._dynamo.reset()
    yield counting
    torch._dynamo.reset()


def test_lengths_and_bands_do_not_recompile(counter: Any) -> None:
    backend, seen = FlexAttention(block_size=(16, 16)), []
    cases = [
        ([(50, 50, 0)], (-1, 0)),
        ([(70, 90, 0), (30, 30, 0)], (-1, 0)),
        ([(20, 70, 0), (90, 30, 5), (10, 0, 0)], (17, 3)),
        ([(64, 64, 0)], (-1, -1)),
        ([(200, 33, 0)], (-1, 0)),
    ]
    for blocks, band in cases:
        call = make_call(blocks, band)
        tensors = drawn(call, torch.float32)
        pairs = (both_ways(x, tensors, call, Options(0.3, softcap=1.5)) for x in (backend, Reference()))
        for got, wanted in zip(*pairs, strict=True):
            torch.testing.assert_close(finite_lse(got), finite_lse(wanted), rtol=1e-4, atol=1e-4)
        seen.append(counter.frame_count)
    assert seen == [2] * len(cases)  # forward alone, and forward with gradients


def test_another_seed_and_place_do_not_recompile(counter: Any) -> None:
    backend, seen = FlexAttention(block_size=(16, 16)), []
    for seed, rows in enumerate((50, 70, 64)):
        call = make_call([(rows, rows, 0)], (-1, 0))
        tensors, index = drawn(call, torch.float32), torch.arange(rows) + 1000 * seed
        options = Options(0.3, dropout=Dropout(0.3, seed, index, index, seed))
        pairs = (both_ways(x, tensors, call, options) for x in (backend, Reference()))
        for got, wanted in zip(*pairs, strict=True):
            torch.testing.assert_close(finite_lse(got), finite_lse(wanted), rtol=1e-4, atol=1e-4)
        seen.append(counter.frame_count)
    assert seen == [4] * 3  # forward alone and with gradients, of the kept pairs and of all


def test_another_scale_compiles_anew_and_is_not_mixed_up(counter: Any) -> None:
    backend, call = FlexAttention(block_size=(16, 16)), make_call([(50, 50, 0)], (-1, 0))
    tensors = drawn(call, torch.float32)
    for options in (Options(0.3), Options(0.1), Options(0.3, softcap=2.0), Options(0.3)):
        pairs = (both_ways(x, tensors, call, options) for x in (backend, Reference()))
        for got, wanted in zip(*pairs, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 6


def test_tuned_settings_reach_the_kernel(monkeypatch: pytest.MonkeyPatch, fresh_caches: None) -> None:
    """What FlexAttention is called with; on GPUs a test of wrong settings shows that they are used."""
    from torch.nn.attention import flex_attention

    seen: list[Any] = []

    class Stop(Exception):
        pass

    def recorded(*_: Any, kernel_options: Any, **__: Any) -> Any:
        seen.append(kernel_options)
        raise Stop

    monkeypatch.setattr(flex_attention, "flex_attention", recorded)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    q, k, v = tensors()
    call = Call((Block((0, 20), (0, 20)),))
    chosen = {"fwd_BLOCK_M": 64, "num_warps": 8}, {"fwd_BLOCK_M": 32, "num_warps": 4}
    for options in chosen:
        with pytest.raises(Stop):
            flex.FlexAttention(kernel_options=options).forward(q, k, v, call, Options(0.3), torch.empty_like(q))
    assert [{name: given[name] for name in chosen[0]} for given in seen] == list(chosen)
