"""scheme="auto": the least predicted time on every rank alike, memory kept, both passes decided apart."""

import contextlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.emulated import attention
from ringattn import Documents, Layout, Mask, MeshShape
from ringattn.parallel.choice.schedule import GAIN, PAIR_SHARE
from ringattn.parallel.machine.machine import Link, Machine
from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.agreement import common_digest
from ringattn.parallel.planning.planner import plan_attention, plan_parts
from ringattn.parallel.pricing.memory import buffer_bytes
from ringattn.parallel.pricing.plan_cost import plan_cost
from ringattn.parallel.schedules.candidates import candidates
from ringattn.settings import AttentionOptions
from tests.parallel.pricing.test_plan_cost import pricer
from tests.strategies import documents, masks

SHAPE = Shape(32, 8, 128, 128)

H200 = SHIPPED["H200"]


def with_links(bandwidth: float, latency: float = 0.0) -> Machine:
    """An H200 whose links are all the same, and whose kernels and copies have no fixed costs."""
    links = dict.fromkeys(H200.links, Link(latency, bandwidth))
    rates = tuple(replace(rate, launch_seconds=0.0, tile_seconds=0.0) for rate in H200.rates)
    fixed = {"copy_seconds": 0.0, "host_pass": 0.0, "host_call": 0.0, "host_message": 0.0}
    return replace(H200, name="test", links=links, rates=rates, **fixed)


@settings(max_examples=25)
@given(
    docs=documents(longest=200, most=8),
    mask=masks,
    mesh=st.sampled_from([(2, 1), (3, 2), (7, 1), (12, 1)]),
    policy=st.sampled_from(["contiguous", "zigzag", "balanced"]),
    limit=st.sampled_from([None, 10**6, 10**9]),
    keep_keys=st.sampled_from([None, False, True]),
    speed=st.sampled_from([1e6, 1e9, 1e13]),
)
def test_all_ranks_choose_alike(
    docs: Documents,
    mask: Mask,
    mesh: tuple[int, int],
    policy: str,
    limit: int | None,
    keep_keys: bool | None,
    speed: float,
) -> None:
    layouts = [Layout(docs, MeshShape(1, *mesh, rank), policy, mask) for rank in range(mesh[0] * mesh[1])]
    plans = []
    for layout in layouts:
        options = AttentionOptions(mask, keep_keys=keep_keys, memory_limit=limit)
        plan = None
        with contextlib.suppress(ValueError):
            plan = plan_parts(layout, Shape(8, 2, 128, 128), options, with_links(speed))
        plans.append(plan)
    if None in plans:  # the limit is too small
        assert limit is not None
        assert not any(plans)
        return
    assert len({common_digest(plan, layout) for plan, layout in zip(plans, layouts, strict=True)}) == 1
    assert len({plan.parts[0][1].reason for plan in plans}) == 1
    for plan in (plan.parts[0][1] for plan in plans):
        size = buffer_bytes(plan, Shape(8, 2, 128, 128))
        assert limit is None or size <= limit
        assert plan.backward is None or not plan.keep_keys
        assert keep_keys in (None, plan.keep_keys)


def test_keys_are_kept_where_they_are_small_and_that_is_faster() -> None:
    packed = [Layout(Documents([30_000] + [1700] * 200), MeshShape(1, 8, 1, rank)) for rank in range(8)]
    plans = {
        keep: [plan_attention(layout, SHAPE, AttentionOptions(keep_keys=keep)) for layout in packed]
        for keep in (None, False)
    }
    assert all(plan.keep_keys and "of keys kept" in plan.reason for plan in plans[None])
    assert not any(plan.keep_keys for plan in plans[False])
    kept, again = (plan_cost(SHIPPED["H200"], plans[keep], SHAPE).total for keep in (None, False))
    assert kept < again

    long = Layout(Documents([262_144]), MeshShape(1, 8))
    again = plan_attention(long, SHAPE)
    assert not again.keep_keys
    assert "keys are not kept, they would take" in again.reason
    roomy = plan_attention(long, SHAPE, AttentionOptions(memory_limit=2**34))
    assert roomy.keep_keys  # there it is said what there is room for

    whole = plan_attention(Layout(Documents([700] * 8), MeshShape(1, 1)), SHAPE)
    assert not whole.keep_keys
    assert "kept" not in whole.reason


@pytest.mark.parametrize("lengths", [[262_144], [65_536], [4096] * 32 + [8192] * 8 + [16_384] * 4, [300] * 400])
def test_the_choice_has_the_least_predicted_time(lengths: list[int]) -> None:
    layout = Layout(Documents(lengths), MeshShape(1, 8, 1, 5), "balanced")
    plan = plan_attention(layout, SHAPE)
    prices = [pricer(layout, Mask()).price(option) for option in candidates(8, "auto", None)]
    planned = {option: option.plan(pricer(layout, Mask()).demand, 5) for option in candidates(8, "auto", None)}
    for number, chosen in enumerate(plan.passes):
        fitting = [price[number] for price in prices]
        best = min(price.seconds for price in fitting)
        taken = next(price for price in fitting if planned[price.schedule].stages == chosen.stages)
        limit = best / (1 - GAIN) if chosen.schedule == "gather" else best
        assert taken.seconds <= limit
        assert f"{taken.seconds * 1e3:.3f} ms" in plan.reason
    for option in candidates(8, "auto", None):
        assert option.name in plan.reason
    assert "H200 (shipped)" in plan.reason


def test_a_window_to_the_right_is_not_one_call() -> None:
    docs = Documents([300] * 40)
    for mask, priced in ((Mask(), True), (Mask(window=(64, 0)), True), (Mask(causal=False, window=(64, 64)), False)):
        plan = plan_attention(Layout(docs, MeshShape(1, 8), "zigzag", mask), SHAPE, AttentionOptions(mask))
        assert ("joint" in plan.reason) == priced


def test_a_slow_network_makes_it_overlap_and_a_fast_one_does_not() -> None:
    layout = Layout(Documents([65_536]), MeshShape(1, 8), "balanced")
    assert plan_attention(layout, SHAPE, machine=with_links(1e15)).schedule == "gather"
    assert plan_attention(layout, SHAPE, machine=with_links(50e9)).schedule == "ring"
    # A short document: the fixed cost of every transfer decides against many of them.
    layout = Layout(Documents([4096]), MeshShape(1, 8), "balanced")
    plan = plan_attention(layout, SHAPE, machine=with_links(1e15, latency=1e-3))
    assert len(plan.stages) == 2


def test_a_limit_makes_more_stages_and_too_small_a_one_is_refused() -> None:
    layout = Layout(Documents([65_536]), MeshShape(1, 8), "balanced")
    free = plan_attention(layout, SHAPE)
    limit = buffer_bytes(free, SHAPE) // 2
    bounded = plan_attention(layout, SHAPE, AttentionOptions(memory_limit=limit, head_chunks=1))
    assert buffer_bytes(bounded, SHAPE) <= limit
    assert len((bounded.backward or bounded).stages) > len((free.backward or free).stages)
    assert "too large" in bounded.reason
    with pytest.raises(ValueError, match=r"memory_limit .* got 1000 bytes; the least that forward needs is \d+"):
        plan_attention(layout, SHAPE, AttentionOptions(memory_limit=1000))
    with pytest.raises(ValueError, match=r"memory_limit .* the least that backward needs is \d+ \(gather\)"):
        plan_attention(layout, SHAPE, AttentionOptions(scheme="gather", memory_limit=limit, head_chunks=1))
    with pytest.raises(ValueError, match="memory_limit must be None or a number of bytes >= 0, got -1"):
        plan_attention(layout, SHAPE, AttentionOptions(memory_limit=-1))


def test_without_a_limit_buffers_stay_in_proportion() -> None:
    layout = Layout(Documents([64 * 2048]), MeshShape(1, 64), "balanced")
    plan = plan_attention(layout, SHAPE)
    for walked in plan.passes:
        rows = [stage.rows for stage in walked.stages[1:]]
        assert max(a + b for a, b in zip(rows, [*rows[1:], 0], strict=True)) <= PAIR_SHARE * layout.tokens()


def mixed_case() -> tuple[Documents, Machine]:
    """Local work hides the forward pass' cast of a gather; nothing hides the casts and reduces of its backward pass."""
    machine = with_links(30e9)
    rates = tuple(replace(rate, query_tile=8, key_tile=8, tail=0.0) for rate in machine.rates)
    return Documents([400, 300, 300, 300, 300, 300, 300]), replace(machine, rates=rates)


def test_passes_are_decided_apart_and_stay_exact() -> None:
    docs, machine = mixed_case()
    layouts = [Layout(docs, MeshShape(1, 3, 1, rank)) for rank in range(3)]
    plans = [
        plan_attention(layout, Shape(2, 1, 128, 128), AttentionOptions(keep_keys=False), machine) for layout in layouts
    ]
    assert all(plan.schedule == "gather" and plan.backward.schedule == "ring" for plan in plans)
    assert "backward:" in str(plans[0])
    generator = torch.Generator().manual_seed(0)
    heads = {"q": 2, "k": 1, "v": 1, "dout": 2}
    x = {
        name: torch.randn(docs.total, count, 4, generator=generator, dtype=torch.float64)
        for name, count in heads.items()
    }
    expected = attention(x, docs, Mask(), 1, "auto", None, "reference")
    got = attention(x, docs, Mask(), 3, "auto", None, "reference", machine=machine)
    for name in ("out", "dq", "dk", "dv"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-12)
