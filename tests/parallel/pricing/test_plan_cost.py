"""Prices of plans: counts and closed forms against the plans themselves, and what changes a price."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn import Documents, Layout, Mask, MeshShape
from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.parallel.placement.pieces import PieceTable
from ringattn.parallel.plan.exchange import exchange_plan
from ringattn.parallel.plan.plan import AttentionPlan
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.planner import plan_attention
from ringattn.parallel.pricing.exchange_times import exchange_times
from ringattn.parallel.pricing.memory import buffer_bytes
from ringattn.parallel.pricing.plan_cost import plan_cost, rank_cost
from ringattn.parallel.pricing.pricer import Pricer
from ringattn.parallel.pricing.setting import PriceInputs
from ringattn.parallel.schedules import demand
from ringattn.parallel.schedules.candidates import candidates
from ringattn.parallel.schedules.demand import KeyDemand
from ringattn.parallel.schedules.schedule import Schedule
from ringattn.settings import AttentionOptions
from tests.strategies import documents, masks

H200 = SHIPPED["H200"]
SHAPE = Shape(32, 8, 128, 128)


def plans_of(
    docs: Documents,
    mask: Mask,
    mesh: tuple[int, int],
    policy: str,
    scheme: str,
    stages: int | None,
    machine: Machine = H200,
    chunks: int = 1,
) -> list[tuple[Layout, AttentionPlan]]:
    ring, ulysses = mesh
    layouts = [Layout(docs, MeshShape(1, ring, ulysses, rank), policy, mask) for rank in range(ring * ulysses)]
    options = AttentionOptions(mask, scheme=scheme, stages=stages, head_chunks=chunks)
    return [(layout, plan_attention(layout, SHAPE, options, machine)) for layout in layouts]


def pricer(layout: Layout, mask: Mask, machine: Machine = H200, chunks: int = 1) -> Pricer:
    exchange = exchange_plan(layout.parts[0].deal(0), 32, 8, 0) if layout.mesh.ulysses > 1 else None
    return Pricer(
        KeyDemand.of(PieceTable.of(layout.parts[0], mask), mask.band),
        PriceInputs(machine, SHAPE, exchange, head_chunks=chunks),
    )


@settings(max_examples=120)
@given(
    docs=documents(longest=90, most=8),
    mask=masks,
    ring=st.integers(2, 12),
    policy=st.sampled_from(["contiguous", "zigzag", "balanced"]),
    scheme=st.sampled_from([("gather", None), ("joint", None), ("ring", 2), ("ring", 3), ("ring", 12)]),
    repeated=st.sampled_from([0, 20, 10_000]),
)
def test_counted_rows_are_those_of_the_plans(
    docs: Documents, mask: Mask, ring: int, policy: str, scheme: tuple[str, int | None], repeated: int
) -> None:
    with mock.patch.object(demand, "REPEATED", repeated):
        counted_as_planned(docs, mask, ring, policy, scheme)


def counted_as_planned(docs: Documents, mask: Mask, ring: int, policy: str, scheme: tuple[str, int | None]) -> None:
    plans = plans_of(docs, mask, (ring, 1), policy, *scheme)
    schedule = candidates(ring, *scheme)[0]
    prices = pricer(plans[0][0], mask)
    work, _ = schedule.passes(prices.positions)
    for rank, (_, plan) in enumerate(plans):
        for number, stage in enumerate(plan.stages):
            for messages, counted in ((stage.receives, work.moved.received), (stage.sends, work.moved.sent)):
                near = sum(message.rows for message in messages if message.peer // 8 == rank // 8)
                assert counted[:, number, rank].tolist() == [near, sum(m.rows for m in messages) - near]
            assert work.buffers[number, rank] == stage.rows
        assert work.messages[rank] == sum(len(stage.sends) + len(stage.receives) for stage in plan.stages)
    # The memory that all ranks reckon with is enough for each of them.
    forward, backward = prices.price(schedule, plans[0][1].keep_keys)
    for rank, (_, plan) in enumerate(plans):
        assert buffer_bytes(plan, SHAPE) <= max(forward.bytes[rank], backward.bytes[rank])


PACKS = {
    "one document": [262_144],
    "packed": [131_072, 32_768, 32_768, 16_384, 16_384, 8192, 8192, 4096, 4096, 2048, 2048, 1024, 1024, 512, 1536],
    "short": [4096] * 32 + [8192] * 8 + [16_384] * 4,
}


# How far a price that is counted may be off that of the plans. An exchange is priced at one position of several; and of
# a ring it is estimated what calls cost beside their work: the more, the shorter documents are.
EXCHANGE_OFF = 0.0004
RING_OFF = {"one document": 0.006, "packed": 0.016, "short": 0.043}


@pytest.mark.parametrize("name", list(PACKS))
@pytest.mark.parametrize(("mesh", "chunks"), [((8, 1), 1), ((8, 1), 4), ((2, 4), 1), ((2, 4), 2)])
@pytest.mark.parametrize("machine", [H200, H200.by_copy_engines().captured()], ids=["collectives", "copy engines"])
def test_counted_prices_are_near_those_of_plans(
    name: str, mesh: tuple[int, int], chunks: int, machine: Machine
) -> None:
    ring_off = 0.066 if name == "short" and chunks > 1 else RING_OFF[name]
    gather_off = 1e-12 if mesh[1] == 1 else EXCHANGE_OFF
    schemes = {("gather", None): gather_off, ("joint", None): gather_off, ("ring", 2): ring_off, ("ring", 4): ring_off}
    for scheme, tolerance in schemes.items():
        plans = plans_of(Documents(PACKS[name]), Mask(), mesh, "balanced", *scheme, machine, chunks)
        assert {plan.head_chunks for _, plan in plans} == {chunks}
        exact = plan_cost(machine, [plan for _, plan in plans], SHAPE)
        prices, (schedule,) = pricer(plans[0][0], Mask(), machine, chunks), candidates(mesh[0], *scheme)
        counted = prices.price(schedule, plans[0][1].keep_keys)
        assert counted[0].seconds == pytest.approx(exact.forward.seconds, rel=tolerance)
        assert counted[1].seconds == pytest.approx(exact.backward.seconds, rel=tolerance)


@pytest.mark.parametrize("mesh", [(8, 1), (2, 4)])
@pytest.mark.parametrize("scheme", [("gather", None), ("ring", 3)])
def test_a_schedule_that_counts_nothing_is_priced_by_its_plans(
    mesh: tuple[int, int], scheme: tuple[str, int | None]
) -> None:
    plans = plans_of(Documents(PACKS["short"]), Mask(), mesh, "balanced", *scheme)
    exact = plan_cost(H200, [plan for _, plan in plans], SHAPE)
    prices, (schedule,) = pricer(plans[0][0], Mask()), candidates(mesh[0], *scheme)
    with mock.patch.object(type(schedule), "passes", Schedule.passes):
        read = prices.price(schedule, plans[0][1].keep_keys)
    tolerance = 1e-12 if mesh[1] == 1 else EXCHANGE_OFF
    assert read[0].seconds == pytest.approx(exact.forward.seconds, rel=tolerance)
    assert read[1].seconds == pytest.approx(exact.backward.seconds, rel=tolerance)


def test_what_kernels_pull_is_waited_for() -> None:
    """Also where long kernels would hide it, which they do with messages that are not short."""
    for lengths, hidden in (([4096] * 3 + [1000] * 2, False), ([32_768] * 3 + [8000] * 2, True)):
        machine = H200.by_copy_engines().captured()
        plans = plans_of(Documents(lengths), Mask(), (2, 1), "balanced", "gather", None, machine)
        cost = plan_cost(machine, [plan for _, plan in plans], SHAPE)
        assert cost.forward.wire > 0
        assert cost.forward.exposed == (0.0 if hidden else pytest.approx(cost.forward.wire))


def test_what_changes_a_price() -> None:
    """More bytes, a slower network, fewer heads: each moves the price the way it must."""
    *_, (_, plan) = plans_of(Documents([65_536]), Mask(), (8, 1), "balanced", "gather", None)
    cost = rank_cost(H200, plan, SHAPE)
    far = rank_cost(replace(H200, gpus_per_node=1), plan, SHAPE)
    assert far.forward.exposed > cost.forward.exposed
    assert far.forward.compute == pytest.approx(cost.forward.compute)
    assert rank_cost(H200, replace(plan, wide_reduce=False), SHAPE).backward.wire < cost.backward.wire
    assert rank_cost(H200, replace(plan, keep_keys=True), SHAPE).backward.wire < cost.backward.wire
    half = rank_cost(H200, plan, replace(SHAPE, query_heads=16))
    assert half.forward.compute < 0.6 * cost.forward.compute
    assert half.buffer_bytes == cost.buffer_bytes
    assert np.isclose(cost.total, cost.forward.seconds + cost.backward.seconds)


def test_transfers_beside_kernels_slow_them_down() -> None:
    *_, (_, ring) = plans_of(Documents([262_144]), Mask(), (8, 1), "balanced", "ring", 2)
    *_, (_, gather) = plans_of(Documents([262_144]), Mask(), (8, 1), "balanced", "gather", None)
    links = {key: replace(link, disturbance=0.0) for key, link in H200.links.items()}
    quiet = replace(H200, links=links)
    bytes_moved = max(ring.received_rows, ring.sent_rows) * SHAPE.key_row_bytes
    more = rank_cost(H200, ring, SHAPE).forward.compute - rank_cost(quiet, ring, SHAPE).forward.compute
    assert more == pytest.approx(bytes_moved * H200.links["node", "p2p"].disturbance)
    # What is waited for disturbs nobody: the innermost position of one document has nothing to compute meanwhile.
    waiting = rank_cost(H200, gather, SHAPE).forward.compute - rank_cost(quiet, gather, SHAPE).forward.compute
    assert 0 <= waiting < more / 5


def test_more_stages_need_less_memory() -> None:
    sizes = [
        buffer_bytes(plans_of(Documents([65_536]), Mask(), (16, 1), "balanced", "ring", stages)[3][1], SHAPE)
        for stages in (2, 4, 8, 16)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0] / 2


@pytest.mark.parametrize(("ulysses", "messages"), [(4, (2, 2)), (16, (2, 3))])
def test_the_exchange_is_one_message_a_pass_each_way(ulysses: int, messages: tuple[int, int]) -> None:
    """With more ranks than key heads their gradients travel apart, in float32."""
    layout = Layout(Documents([65_536]), MeshShape(1, 1, ulysses, 1))
    plan = plan_attention(layout, SHAPE)
    heads, keys = 32 // ulysses, max(1, 8 // ulysses)
    rows, sent = layout.tokens(), ulysses - 1
    there = rows * sent * (heads + 2 * keys) * 128 * 2
    back = rows * sent * heads * 128 * 2
    wide = rows * sent * 2 * keys * 128 * 4
    for backward, count in zip((False, True), messages, strict=True):
        machine = replace(H200, gpus_per_node=16)
        link = machine.links["node", "all_to_all"]
        size = there + back if count == 2 else 2 * back + wide
        times = exchange_times(machine, plan.exchange, 0, SHAPE, backward)
        assert times.wire == pytest.approx(count * link.latency + size / link.bandwidth)
        assert times.messages == count
        assert times.copies > 0
    assert buffer_bytes(plan, SHAPE) > 65_536 * heads * 2 * 128 * 2
    assert exchange_times(H200, None, 0, SHAPE, False) == (0, 0, 0, 0)


def test_no_pass_is_faster_than_its_launches() -> None:
    """Many short documents: the kernels wait for the host, however fast they are."""
    layout = Layout(Documents([40] * 400), MeshShape(1, 8), "zigzag")
    plan = plan_attention(layout, SHAPE, AttentionOptions(scheme="gather"))
    slow = replace(H200, host_message=1e-3)
    messages = sum(len(stage.sends) + len(stage.receives) for stage in plan.stages)
    assert messages > 10
    for cost, passes in ((rank_cost(slow, plan, SHAPE).forward, 1), (rank_cost(slow, plan, SHAPE).backward, 2)):
        assert cost.seconds >= passes * messages * 1e-3
    quiet = replace(H200, host_pass=0.0, host_call=0.0, host_message=0.0)
    assert rank_cost(quiet, plan, SHAPE).forward.seconds < rank_cost(H200, plan, SHAPE).forward.seconds
    long = plan_attention(Layout(Documents([262_144]), MeshShape(1, 8)), SHAPE, AttentionOptions(scheme="gather"))
    assert rank_cost(quiet, long, SHAPE) == rank_cost(H200, long, SHAPE)
