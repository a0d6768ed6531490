"""FEATURES A.6 beside tuning: the registry, and what the operations of other systems take."""

import inspect
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ringattn import Documents, Layout, Mask, MeshShape, environment, parallel_attention
from ringattn.drawing import area, picture
from ringattn.kernels import registry
from ringattn.kernels.backends import flex
from ringattn.kernels.spec import Backend, Block, Call, Capability, Options
from ringattn.parallel.planning.planner import plan_attention
from tests.dense import Case, dense_attention
from tests.hf import one_layer as hf
from tests.kernels.test_registry import BUILTIN, SPEC, Entry, Fake, clear, plug
from tests.parallel.ranks import attend
from tests.pool import Pools
from tests.strategies import documents, masks

DOCS = Documents([12, 8])
LAYOUT = Layout(DOCS, MeshShape())


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing that a test found out is left to the next."""
    monkeypatch.delenv("RINGATTN_BACKEND", raising=False)
    clear()
    yield
    clear()


def tensors(tokens: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(tokens, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    return q, k, v


@pytest.mark.parametrize("backend", registry.builtin(), ids=lambda backend: backend.name)
def test_row_56_backends_have_the_signatures_of_the_contract(backend: Backend) -> None:
    assert registry.defect_of(backend) is None
    for name in ("missing", "forward", "backward"):
        wanted = [*inspect.signature(getattr(Backend, name)).parameters.values()][1:]
        got = [*inspect.signature(getattr(backend, name)).parameters.values()]
        assert [(x.name, x.kind, x.default) for x in got] == [(x.name, x.kind, x.default) for x in wanted]


def test_row_56_no_two_backends_share_a_place() -> None:
    assert len(set(BUILTIN)) == len(BUILTIN) == len(registry.builtin())


class NoBackward:
    """Cannot train."""

    name = "npu2"
    capability = Capability()
    missing = Fake.missing
    forward = Fake.forward


class OldBackward(Fake):
    """Written for another contract."""

    def backward(self, dout: Tensor, q: Tensor) -> None:  # type: ignore[override]
        raise AssertionError


class Undeclared(Fake):
    capability = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("candidate", "told"),
    [
        (NoBackward, "has no backward"),
        (OldBackward, r"cannot be called as backward\(dout, q, k, v, out, lse, "),
        (Undeclared, "has no capability"),
    ],
)
def test_row_56_a_plug_in_that_is_no_backend_is_ignored(
    monkeypatch: pytest.MonkeyPatch, candidate: Any, told: str
) -> None:
    plug(monkeypatch, Entry("npu2", lambda: candidate))
    with pytest.warns(UserWarning, match=f"package:npu2 is no backend: it {told}"):
        assert list(registry.backends()) == BUILTIN


def test_row_57_the_argument_wins_over_the_environment_over_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.choose(SPEC).name == "cpu"
    monkeypatch.setenv("RINGATTN_BACKEND", "reference")
    assert registry.choose(SPEC).name == "reference"
    assert registry.choose(SPEC, "cpu").name == "cpu"
    monkeypatch.setenv("RINGATTN_BACKEND", "fa9")
    assert registry.choose(SPEC, "cpu").name == "cpu"
    with pytest.raises(ValueError, match=r"auto or one of fa4, fa3, .*cpu, .*reference, got 'fa9'"):
        registry.choose(SPEC)


def test_row_57_an_unknown_name_is_told_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"backend must be auto or one of fa4, .*reference, got 'nope'"):
        parallel_attention(*tensors(), LAYOUT, backend="nope")


def test_row_57_a_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ringattn"):
        for _ in range(3):
            registry.choose(SPEC)
            registry.choose(SPEC, "reference")
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("backend ")]
    assert [text.partition(":")[0] for text in told] == [
        "backend cpu, asked for auto",
        "backend reference, asked for reference",
    ]


def test_row_57_the_environment_makes_the_log_visible(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RINGATTN_LOG", "info")
    environment.logger.cache_clear()
    logger, before = logging.getLogger("ringattn"), logging.getLogger("ringattn").level
    try:
        registry.choose(SPEC)
        assert "ringattn: backend cpu, asked for auto: CallSpec(" in capsys.readouterr().err
    finally:
        logger.handlers.clear()
        logger.setLevel(before)
        environment.logger.cache_clear()


RUNS = st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=6)


@given(runs=RUNS, causal=st.booleans())
def test_row_68_segment_ids_and_negative_ones_are_padding(runs: list[tuple[int, bool]], causal: bool) -> None:
    """Against a mask made of the ids themselves."""
    ids = torch.tensor([-1 if pad else number for number, (size, pad) in enumerate(runs) for _ in range(size)])
    x = [y.requires_grad_() for y in tensors(len(ids))]
    layout = Layout(Documents.from_segment_ids(ids), MeshShape())
    local = [layout.shard(y) for y in x]
    out = layout.unshard(parallel_attention(*local, layout, mask=Mask(causal=causal), backend="reference"))
    grads = torch.autograd.grad(out.sin().sum(), x)
    allowed = (ids[:, None] == ids[None, :]) & (ids[:, None] >= 0)
    allowed &= torch.ones_like(allowed).tril() if causal else True
    q, k, v = (y.detach().clone().requires_grad_() for y in x)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * 8**-0.5
    scores = scores.masked_fill(~allowed, -1e30)
    weights = scores.softmax(-1) * allowed.any(-1)[:, None]
    expected = torch.einsum("hqk,khv->qhv", weights, v.repeat_interleave(2, 1))
    wanted = torch.autograd.grad(expected.sin().sum(), (q, k, v))
    for got, reference in zip((out, *grads), (expected, *wanted), strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-12, atol=1e-12)
        assert (got[ids < 0] == 0).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_row_69_cumulative_lengths_need_no_mask(backend: str) -> None:
    """Each document alone, bit by bit."""
    q, k, v = tensors()
    docs = Documents.from_cu_seqlens(torch.tensor([0, 5, 5, 12, 20], dtype=torch.int32))
    together = parallel_attention(q, k, v, Layout(docs, MeshShape()), backend=backend)
    for start, size in zip(docs.starts, docs.lengths, strict=True):
        rows = slice(start, start + size)
        alone = Layout(Documents([size]), MeshShape())
        assert torch.equal(together[rows], parallel_attention(q[rows], k[rows], v[rows], alone, backend=backend))


@pytest.mark.parametrize("name", ["normalize_output", "logits_dtype", "precision", "softmax_dtype", "axis_name"])
def test_row_70_what_nobody_honours_is_refused(name: str) -> None:
    keywords: Any = {name: None}
    with pytest.raises(TypeError, match=f"unknown argument {name!r}"):
        parallel_attention(*tensors(), LAYOUT, **keywords)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_row_70_partial_results_are_made_of_out_and_lse(backend: str) -> None:
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


@pytest.mark.parametrize("name", ["sinks", "s_aux", "learnable_sink", "softmax_aux"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_row_71_sinks_train_under_every_name(name: str, backend: str) -> None:
    sinks = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    keywords: Any = {name: sinks}
    parallel_attention(*tensors(), LAYOUT, backend=backend, **keywords).square().sum().backward()
    assert sinks.grad is not None
    assert (sinks.grad.abs() > 1e-3).all()


def test_row_72_the_shape_of_the_mesh_changes_nothing(pool: Pools) -> None:
    case = Case(Documents([33, 1, 14]), Mask(window=(9, 0)), (4, 2), sinks=True)
    expected = dense_attention(case)
    for ring, ulysses in ((1, 4), (2, 2), (4, 1)):
        for got in pool(4).run(attend, case, ring, ulysses, "auto", "auto"):
            for name, reference in expected.items():
                torch.testing.assert_close(got[name], reference, rtol=1e-12, atol=1e-12)


@given(
    docs=documents(longest=20, most=4),
    mask=masks,
    ring=st.integers(1, 4),
    policy=st.sampled_from(["contiguous", "zigzag", "balanced"]),
    scheme=st.sampled_from(["gather", "joint", "ring"]),
)
def test_row_73_the_picture_of_a_plan_is_its_mask(
    docs: Documents, mask: Mask, ring: int, policy: str, scheme: str
) -> None:
    """Every pair once; and the areas of the ranks add up to the mask's."""
    layouts = [Layout(docs, MeshShape(1, ring, 1, rank), policy, mask) for rank in range(ring)]
    plans = [plan_attention(layout, mask, 4, 2, scheme if ring > 1 else "auto") for layout in layouts]
    dense = docs.dense(mask)
    lines = picture(plans, docs.total).splitlines() if docs.total else []
    assert [[sign != "." for sign in line] for line in lines] == dense.tolist()
    assert sum(area(plan) for plan in plans) == int(dense.sum())


def test_row_73_the_picture_shows_the_stages() -> None:
    """Two ranks, one document, contiguous: the second receives the keys of the first."""
    layouts = [Layout(Documents([6]), MeshShape(1, 2, 1, rank), "contiguous") for rank in range(2)]
    plans = [plan_attention(layout, Mask(), 4, 2, "ring") for layout in layouts]
    assert picture(plans, 6).split() == ["0.....", "00....", "000...", "1110..", "11100.", "111000"]
    assert [area(plan) for plan in plans] == [6, 15]


@pytest.mark.parametrize("name", ["attention_sink_size", "causal_block_size", "axis_name", "prevent_cse", "policy"])
def test_row_74_arguments_of_a_scanned_ring_are_refused(name: str) -> None:
    """What they stand for is a plan's own business, or is not done: always visible first tokens."""
    keywords: Any = {name: 4}
    with pytest.raises(TypeError, match=f"unknown argument {name!r}"):
        parallel_attention(*tensors(), LAYOUT, **keywords)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_row_75_a_sink_is_not_added_in_every_stage(pool: Pools, stages: int) -> None:
    case = Case(Documents([40]), heads=(4, 2), sinks=True, options={"stages": stages})
    for got in pool(4).run(attend, case, 4, 1, "contiguous", "ring"):
        for name, reference in dense_attention(case).items():
            torch.testing.assert_close(got[name], reference, rtol=1e-12, atol=1e-12)


def test_row_75_tuned_settings_reach_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
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
    flex._compiled.cache_clear()
    for options in chosen:
        with pytest.raises(Stop):
            flex.FlexAttention(kernel_options=options).forward(q, k, v, call, Options(0.3), torch.empty_like(q))
    flex._compiled.cache_clear()
    assert [{name: given[name] for name in chosen[0]} for given in seen] == list(chosen)


def test_row_76_linear_attention_is_refused(pool: Pools) -> None:
    config: dict[str, object] = {"num_hidden_layers": 4, "hidden_size": 64}
    with pytest.raises(NotImplementedError, match="linear_attention"):
        pool(1).run(hf.refused, "Qwen3NextForCausalLM", config)
