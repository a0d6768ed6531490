"""FEATURES A.5: numbers, heads and what a layer is given."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from ringattn import Documents, Layout, Mask, MeshShape, parallel_attention
from ringattn.kernels import registry, selftest
from ringattn.kernels.backends.fa2 import FlashAttention2
from ringattn.kernels.backends.reference import Reference, kept_pairs
from ringattn.kernels.merge import merge_
from ringattn.kernels.spec import Block, Call, CallSpec, Grads, Options
from ringattn.parallel.transport.collective import GroupTransport
from tests.dense import Case, dense_attention, relative_error
from tests.hf import one_layer as hf
from tests.parallel.ranks import attend, mesh_of
from tests.pool import Pools

DOCS = Documents([12, 8])
LAYOUT = Layout(DOCS, MeshShape())
# ring × ulysses and a scheme for every number of ranks
MESHES = {1: (1, 1, "auto"), 2: (1, 2, "ulysses"), 4: (2, 2, "hybrid")}


def tensors(*dims: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of `DOCS`, with head dims D and V (default 8 and 8)."""
    D, V = dims or (8, 8)
    generator = torch.Generator().manual_seed(0)
    shapes = (20, 4, D), (20, 2, D), (20, 2, V)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v


def dense(scale: float, softcap: float = 0.0, dims: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor]:
    """Causal attention of `tensors` (T, H, V) and its lse (H, T)."""
    q, k, v = tensors(*dims)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~DOCS.dense(Mask()), -math.inf)
    return torch.einsum("hqk,khv->qhv", scores.softmax(-1), v.repeat_interleave(2, 1)), scores.logsumexp(-1)


def assert_exact(got: dict[str, Tensor], case: Case, tolerance: float = 1e-12) -> None:
    for name, reference in dense_attention(case).items():
        torch.testing.assert_close(got[name].double(), reference, rtol=tolerance, atol=tolerance)


def layer(keywords: dict[str, Any]) -> Tensor:
    return hf.interface(DOCS, tensors(), keywords)[0]


def on_the_wire(dtypes: tuple[torch.dtype, ...], autocast: bool, dims: tuple[int, int] = (8, 8)) -> dict[str, Any]:
    """Dtypes and bytes that a ring of two sends of its keys in the forward pass, and what comes back."""
    sent: list[Tensor] = []
    exchange = GroupTransport.exchange

    def watched(self: GroupTransport, send: Tensor, receive: Tensor, route: Any) -> Any:
        sent.append(send)
        return exchange(self, send, receive, route)

    layout = Layout(Documents([20]), mesh_of(2, 1), "contiguous")
    local = [layout.shard(x).to(dtype) for x, dtype in zip(tensors(*dims), dtypes, strict=True)]
    GroupTransport.exchange = watched  # type: ignore[method-assign]
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), warnings.catch_warnings():
            warnings.simplefilter("error")
            out = parallel_attention(*local, layout, scheme="gather")
    finally:
        GroupTransport.exchange = exchange  # type: ignore[method-assign]
    return {
        "dtypes": {x.dtype for x in sent},
        "bytes": sum(x.numel() * x.element_size() for x in sent),
        "rows": layout.tokens(),
        "out": out.dtype,
    }


def test_row_40_under_autocast_the_wire_is_narrow(pool: Pools) -> None:
    """Queries of a norm in float32 beside keys of a bfloat16 layer: cast before they are sent."""
    wide, narrow = torch.float32, torch.bfloat16
    for dtypes in ((wide, narrow, narrow), (wide, wide, wide)):
        results = pool(2).run(on_the_wire, dtypes, True)
        assert {dtype for found in results for dtype in found["dtypes"]} == {narrow}
        assert all(found["out"] == narrow for found in results)
    assert {dtype for found in pool(2).run(on_the_wire, (wide,) * 3, False) for dtype in found["dtypes"]} == {wide}


def test_row_40_without_autocast_nothing_is_cast_in_silence() -> None:
    q, k, v = tensors(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"share one floating dtype, got torch.float32, torch.bfloat16"):
        parallel_attention(q.float(), k, v, LAYOUT)
    with pytest.raises(NotImplementedError, match="cast the model or use autocast"):
        registry.choose(CallSpec("cuda", torch.float32, 64, 64, 4, 2), "fa4")


def test_row_41_the_scale_is_that_of_the_queries_head_dim(pool: Pools) -> None:
    out = parallel_attention(*tensors(24, 12), LAYOUT)
    torch.testing.assert_close(out, dense(24**-0.5, dims=(24, 12))[0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(out, dense(12**-0.5, dims=(24, 12))[0], atol=1e-3)
    given = pool(1).run(layer, {"scaling": 0.3})[0]
    torch.testing.assert_close(given, dense(0.3)[0], rtol=1e-12, atol=1e-12)


def test_row_42_scores_are_capped_before_the_mask_and_in_the_lse(pool: Pools) -> None:
    out, lse = parallel_attention(*tensors(), LAYOUT, softcap=2.0, return_lse=True)
    for got, expected in zip((out, lse), dense(8**-0.5, 2.0), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pool(1).run(layer, {"softcap": 2.0})[0], out, rtol=1e-12, atol=1e-12)
    other = parallel_attention(*tensors(), LAYOUT, softcap=3.0)
    assert (out - other).abs().max() > 1e-3


def test_row_42_gradients_are_those_of_finite_differences() -> None:
    small = Layout(Documents([4, 2]), MeshShape())
    inputs = [x[:6, :, :2].contiguous().requires_grad_() for x in tensors()]
    assert torch.autograd.gradcheck(lambda *x: parallel_attention(*x, small, softcap=2.0), inputs)


def test_row_42_zero_and_none_are_off_and_wrong_caps_are_refused() -> None:
    plain = parallel_attention(*tensors(), LAYOUT, backend="reference")
    for off in (None, 0.0):
        assert torch.equal(plain, parallel_attention(*tensors(), LAYOUT, softcap=off, backend="reference"))
    for wrong in (-1.0, math.nan):
        with pytest.raises(ValueError, match=f"softcap must be >= 0 .* got {wrong}"):
            parallel_attention(*tensors(), LAYOUT, softcap=wrong)


def test_row_43_dropout_drops_its_share_and_another_seed_drops_others() -> None:
    index = torch.arange(200)
    kept = kept_pairs(7, 0.3, index, index, 0, 4)
    assert kept.double().mean().item() == pytest.approx(0.7, abs=0.005)
    assert kept[0].double().mean(0).std() < 0.06
    assert not torch.equal(kept, kept_pairs(8, 0.3, index, index, 0, 4))
    assert torch.equal(kept[2:], kept_pairs(7, 0.3, index, index, 2, 2))
    assert torch.equal(kept[:, 50:, 90:], kept_pairs(7, 0.3, index[50:], index[90:], 0, 4))
    assert kept_pairs(7, 0.0, index, index, 0, 4).all()


def dropped(ring: int, ulysses: int, scheme: str) -> Tensor:
    """(T, H, T) booleans: which probabilities are dropped, seen by values that are the rows of the identity."""
    layout = Layout(DOCS, mesh_of(ring, ulysses), "balanced")
    q, k, _ = tensors()
    v = torch.eye(20, dtype=torch.float64)[:, None, :].expand(-1, 2, -1)
    local = [layout.shard(x.contiguous()) for x in (q, k, v)]
    out = parallel_attention(*local, layout, dropout_p=0.4, dropout_seed=11, scheme=scheme)
    return layout.unshard(out) == 0


@pytest.mark.parametrize(("ring", "ulysses", "scheme"), [(4, 1, "ring"), (4, 1, "gather"), (1, 4, "ulysses")])
def test_row_43_four_ranks_drop_what_one_drops(pool: Pools, ring: int, ulysses: int, scheme: str) -> None:
    alone = pool(1).run(dropped, 1, 1, "auto")[0]
    for together in pool(4).run(dropped, ring, ulysses, scheme):
        assert torch.equal(alone, together)
    share = alone[DOCS.dense(Mask())[:, None, :].expand_as(alone)].double().mean()
    assert 0.3 < share < 0.5


def test_row_43_kernels_that_draw_their_own_mask_refuse(monkeypatch: pytest.MonkeyPatch, pool: Pools) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    spec = CallSpec("cuda", torch.bfloat16, 64, 64, 4, 2, dropout_p=0.1)
    assert "depends on how the sequence is split" in (FlashAttention2().capability.refusal(spec) or "")
    with pytest.raises(NotImplementedError, match="attention_dropout"):
        pool(1).run(layer, {"dropout": 0.1})
    with pytest.raises(ValueError, match=r"dropout_seed must be an integer >= 0 with dropout_p=0.5"):
        parallel_attention(*tensors(), LAYOUT, dropout_p=0.5)


def both_ways(backend: str) -> list[Tensor]:
    x = [y.requires_grad_() for y in tensors()]
    out = parallel_attention(*x, LAYOUT, deterministic=True, backend=backend)
    return [out, *torch.autograd.grad(out.square().sum(), x)]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_row_44_two_runs_are_equal_bit_by_bit(backend: str) -> None:
    assert registry.backends()[backend].capability.deterministic
    assert all(torch.equal(a, b) for a, b in zip(both_ways(backend), both_ways(backend), strict=True))


SINKS = Case(Documents([33, 1, 14]), Mask(window=(20, 0)), (6, 2), sinks=True)


@pytest.mark.parametrize(
    ("ring", "ulysses", "scheme", "stages"),
    [
        (1, 1, "auto", None),
        (4, 1, "ring", 2),
        (4, 1, "ring", 4),
        (4, 1, "gather", None),
        (4, 1, "joint", None),
        (1, 4, "ulysses", None),
    ],
)
def test_row_45_a_sink_counts_once_whatever_the_stages(
    pool: Pools, ring: int, ulysses: int, scheme: str, stages: int | None
) -> None:
    """Out, lse and all gradients, that of the sinks included; under Ulysses every rank has its heads' sinks."""
    case = SINKS if stages is None else Case(**SINKS.__dict__ | {"options": {"stages": stages}})
    for got in pool(ring * ulysses).run(attend, case, ring, ulysses, "balanced", scheme):
        assert_exact(got, case)


def test_row_45_a_sink_is_a_key_of_value_zero(pool: Pools) -> None:
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain, lse = dense(8**-0.5)
    expected = plain * torch.sigmoid(lse - sinks[:, None]).T[..., None]
    for got in (parallel_attention(*tensors(), LAYOUT, sinks=sinks), pool(1).run(layer, {"s_aux": sinks})[0]):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert (plain - expected).abs().max() > 0.1


@pytest.mark.parametrize("world", [1, 2, 4])
def test_row_46_fewer_key_heads_than_ranks_and_uneven_heads(pool: Pools, world: int) -> None:
    """Keys' gradients are summed over the ranks that hold copies."""
    ring, ulysses, scheme = MESHES[world]
    cases = [Case(Documents([21, 9]), heads=heads) for heads in ((4, 4), (4, 2), (4, 1), (6, 2))]
    places = [(ring, ulysses, scheme)] + ([(1, 4, "ulysses")] if world == 4 else [])
    for place in places:
        jobs = [(case, *place[:2], "balanced", place[2]) for case in cases]
        for case, results in zip(cases, pool(world).run_many(attend, jobs), strict=True):
            for got in results:
                assert_exact(got, case)


def test_row_47_values_of_another_dim_are_not_padded_on_the_wire(pool: Pools) -> None:
    """The first of two ranks sends its 10 rows of two heads; the second has no query's keys to send."""
    results = pool(2).run(on_the_wire, (torch.float64,) * 3, False, (24, 12))
    assert [found["rows"] for found in results] == [10, 10]
    assert [found["bytes"] for found in results] == [10 * 2 * (24 + 12) * 8, 0]


@pytest.mark.parametrize(("ring", "ulysses", "scheme"), [(2, 1, "ring"), (1, 2, "ulysses")])
def test_row_47_values_of_another_dim_are_exact(pool: Pools, ring: int, ulysses: int, scheme: str) -> None:
    case = Case(Documents([21, 9]), heads=(4, 2), dims=(24, 12), sinks=True)
    for got in pool(2).run(attend, case, ring, ulysses, "balanced", scheme):
        assert_exact(got, case)


def test_row_48_a_layer_with_larger_heads_gets_a_backend_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 4 has head dims 256 and 512: each layer asks for itself, and the kernels' limits are named."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(selftest, "failure", lambda backend, spec: None)
    for name, backend in registry.backends().items():
        installed = None if name in ("torch", "reference") else "is not installed"
        monkeypatch.setattr(backend, "missing", lambda installed=installed: installed)
    registry._chosen.cache_clear()
    registry._warn_of_reference.cache_clear()
    small, large = (CallSpec("cuda", torch.bfloat16, dim, dim, 8, 4) for dim in (256, 512))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert registry.choose(small).name == "torch"
            assert registry.choose(large).name == "reference"
    (warning,) = caught
    assert "torch takes head dims up to 256, got 512" in str(warning.message)
    registry._chosen.cache_clear()


def test_row_48_large_heads_are_exact() -> None:
    outs = [parallel_attention(*tensors(512, 512), LAYOUT, backend=name) for name in ("cpu", "reference")]
    torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("docs", [Documents([1]), Documents([0, 2], [0, 1], 5), Documents([])], ids=str)
@pytest.mark.parametrize(
    ("ring", "ulysses", "scheme"), [(4, 1, "ring"), (4, 1, "gather"), (1, 4, "ulysses"), (2, 2, "hybrid")]
)
def test_row_49_ranks_without_tokens_join(pool: Pools, ring: int, ulysses: int, scheme: str, docs: Documents) -> None:
    case = Case(docs, heads=(4, 2))
    for got in pool(4).run(attend, case, ring, ulysses, "balanced", scheme):
        assert_exact(got, case)


def merged_error(parts: int) -> dict[str, float]:
    """Errors of a bfloat16 kernel whose keys come in parts, against float64."""
    generator = torch.Generator().manual_seed(0)
    rows, heads, dim = 256, 2, 64
    q, k, v, dout = (torch.randn(rows, heads, dim, generator=generator).bfloat16() for _ in range(4))
    whole, options = Call((Block((0, rows), (0, rows)),)), Options(dim**-0.5)
    backend, judge = registry.backends()["cpu"], Reference()
    wide = [x.double() for x in (q, k, v, dout)]
    expected_out = torch.empty_like(wide[0])
    expected_lse = judge.forward(*wide[:3], whole, options, expected_out)
    expected = Grads(*(torch.empty_like(x) for x in wide[:3]))
    judge.backward(wide[3], *wide[:3], expected_out, expected_lse, whole, options, expected)
    size = rows // parts
    call = Call((Block((0, rows), (0, size)),))
    out, lse = torch.zeros(rows, heads, dim), torch.full((heads, rows), -math.inf)
    for start in range(0, rows, size):
        keys, part = slice(start, start + size), torch.empty_like(q)
        part_lse = backend.forward(q, k[keys], v[keys], call, options, part)
        assert part_lse.dtype == torch.float32
        merge_(out, lse, part, part_lse)
    grads = Grads(torch.zeros(rows, heads, dim), torch.empty_like(k), torch.empty_like(v))
    for start in range(0, rows, size):
        keys, dq = slice(start, start + size), torch.empty_like(q)
        target = Grads(dq, grads.dk[keys], grads.dv[keys])
        backend.backward(dout, q, k[keys], v[keys], out.bfloat16(), lse, call, options, target)
        grads.dq.add_(dq)
    got = {"out": out.bfloat16(), "lse": lse, "dq": grads.dq, "dk": grads.dk, "dv": grads.dv}
    return {
        name: relative_error(got[name], x) for name, x in zip(got, (expected_out, expected_lse, *expected), strict=True)
    }


def test_row_50_errors_do_not_grow_with_the_parts() -> None:
    """Out and lse are accumulated in float32: 1.5 times the error of a single pass at most."""
    single = merged_error(1)
    for parts in (4, 16):
        errors = merged_error(parts)
        assert errors.pop("lse") < 1e-5  # of float32; through bfloat16 it would be 1e-3
        for name, error in errors.items():
            assert error <= 1.5 * single[name], (parts, name)


@pytest.mark.parametrize("name", ["bias", "position_bias", "attn_bias", "alibi_slopes"])
def test_row_51_a_bias_is_refused(pool: Pools, name: str) -> None:
    keywords: Any = {name: torch.zeros(4, 20, 20)}
    with pytest.raises(TypeError, match=f"unknown argument {name!r}"):
        parallel_attention(*tensors(), LAYOUT, **keywords)
    with pytest.raises((TypeError, NotImplementedError), match=name):
        pool(1).run(layer, keywords)


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("MptForCausalLM", {"d_model": 64, "n_layers": 2, "n_heads": 4}, "outside transformers"),
        ("T5ForConditionalGeneration", {"d_model": 32, "num_layers": 2, "num_heads": 2}, "encoder-decoder"),
    ],
)
def test_row_51_models_with_a_bias_are_refused(pool: Pools, family: str, config: dict[str, object], words: str) -> None:
    with pytest.raises(NotImplementedError, match=f"{family}.*{words}"):
        pool(1).run(hf.refused, family, config)


def test_row_52_the_attention_matrix_is_refused(pool: Pools) -> None:
    with pytest.raises(NotImplementedError, match="output_attentions: flash attention never forms"):
        pool(1).run(layer, {"output_attentions": True})
    out, weights = pool(1).run(hf.interface, DOCS, tensors(), {"output_attentions": False})[0]
    torch.testing.assert_close(out, dense(8**-0.5)[0], rtol=1e-12, atol=1e-12)
    assert weights is None


def longer_keys() -> Tensor:
    q, k, v = tensors()
    return hf.interface(Documents([5]), (q[:5], k, v), {})[0]


def test_row_53_caches_are_refused(pool: Pools) -> None:
    """Generation as a whole, and a layer whose cache has given it more keys than queries."""
    with pytest.raises((ValueError, NotImplementedError), match=r"Documents|shard_batch|KV cache"):
        pool(1).run(hf.generate)
    with pytest.raises((ValueError, NotImplementedError), match=r"5 .* 20"):
        pool(1).run(longer_keys)


@pytest.mark.parametrize("name", ["cache", "block_table", "seqused_k"])
def test_row_54_paged_attention_is_refused(pool: Pools, name: str) -> None:
    with pytest.raises((NotImplementedError, TypeError), match=name):
        pool(1).run(layer, {name: torch.zeros(1)})
