"""The simulator: cases counted by hand, and what no schedule can beat."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn import Documents, Layout, Mask, MeshShape
from ringattn.kernels.spec import Block, Call
from ringattn.parallel.machine.kernel_rate import KernelRate
from ringattn.parallel.machine.machine import Link, Machine
from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.parallel.plan.plan import AttentionPlan, Stage
from ringattn.parallel.plan.route import Message
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.all_ranks import plan_group
from ringattn.parallel.planning.planner import plan_attention
from ringattn.parallel.pricing.plan_cost import plan_cost, rank_cost
from ringattn.parallel.simulation.simulate import Scenario, simulate
from ringattn.parallel.simulation.spans import Pass
from ringattn.parallel.simulation.traffic import BatchKey, Traffic
from ringattn.settings import AttentionOptions

# A call takes a second, a byte a second, a batch half a second; copies and merges are free.
SIMPLE = Machine(
    name="simple",
    gpus_per_node=8,
    links={
        (where, how): Link(0.5, 1.0 if where == "node" else 0.5)
        for where in ("node", "network")
        for how in ("p2p", "all_to_all", "copy")
    },
    rates=tuple(KernelRate(1, backward, 1e30, launch_seconds=1.0) for backward in (False, True)),
    copy_bandwidth=1e30,
    merge_bandwidth=1e30,
    copy_seconds=0.0,
)
ONE = Shape(1, 1, 1, 1, 2)  # 4 bytes a row of keys and values, 8 in float32
CALL = Call((Block((0, 2), (0, 2)),))


def chain(rank: int, rows: tuple[int, ...], stages: int = 2, **fields) -> AttentionPlan:
    """Two ranks; in every later stage each sends the other `rows[rank]` rows."""
    stage = Stage(
        (CALL,),
        rows[1 - rank],
        sends=(Message(1 - rank, ((0, rows[rank]),)),),
        receives=(Message(1 - rank, ((0, rows[1 - rank]),)),),
    )
    return AttentionPlan(
        "ring", 2, rank, 2, ((0, 2),), (Stage((CALL,)), *[stage] * (stages - 1)), (0, 0), (0, 0), **fields
    )


def pair(rows: tuple[int, ...], stages: int = 2, **fields) -> list[AttentionPlan]:
    return [chain(rank, rows, stages, **fields) for rank in (0, 1)]


def timeline(done: Pass, rank: int) -> list[tuple[str, int, float, float]]:
    return [(span.kind, span.stage, span.begin, span.end) for span in done.spans if span.rank == rank]


def test_forward_of_two_ranks_by_hand():
    """A row is 4 bytes: 4 s and 0.5 s latency under a second of compute, then the second call."""
    done = simulate(SIMPLE, pair((1, 1)), ONE, backward=False)
    for rank in (0, 1):
        assert timeline(done, rank) == [("compute", 0, 0, 1), ("cast", 1, 0, 4.5), ("compute", 1, 4.5, 5.5)]
    assert done.seconds == 5.5
    assert done.busy("compute") == [2, 2]


def test_both_directions_of_a_batch_must_be_done():
    done = simulate(SIMPLE, pair((1, 2)), ONE, backward=False)
    assert done.ends == [9.5, 9.5]  # rank 0 receives 8 bytes, and rank 1 waits until it has sent them
    assert simulate(SIMPLE, pair((1, 2), keep_keys=True), ONE, backward=False).seconds == 9.5


def test_backward_of_two_ranks_by_hand():
    """Cast 4.5, compute 1, reduce 8 bytes in 8.5 beside the local second."""
    done = simulate(SIMPLE, pair((1, 1)), ONE, backward=True)
    expected = [("cast", 1, 0, 4.5), ("compute", 1, 4.5, 5.5), ("reduce", 1, 5.5, 14), ("compute", 0, 5.5, 6.5)]
    assert timeline(done, 0) == sorted(expected, key=lambda span: (span[2], span[1]))
    assert done.seconds == 14
    assert simulate(SIMPLE, pair((1, 1), wide_reduce=False), ONE, backward=True).seconds == 10
    assert simulate(SIMPLE, pair((1, 1), keep_keys=True), ONE, backward=True).seconds == 9.5


def test_the_pass_that_the_backward_follows_may_be_another():
    plans = [replace(plan, backward=other) for plan, other in zip(pair((1, 1)), pair((2, 2)), strict=True)]
    assert simulate(SIMPLE, plans, ONE, backward=True).seconds == 8.5 + 1 + 16.5
    assert simulate(SIMPLE, plans, ONE, backward=False).seconds == 5.5


def test_the_reduce_of_a_stage_follows_the_cast_of_the_next():
    """One stream of transfers: cast 1 to 4.5, cast 2 to 9, then reduce 1 to 17.5, then reduce 2 to 26."""
    done = simulate(SIMPLE, pair((1, 1), stages=3), ONE, backward=True)
    spans = {(kind, stage): (begin, end) for kind, stage, begin, end in timeline(done, 0)}
    assert spans["cast", 2] == (4.5, 9)
    assert spans["compute", 2] == (9, 10)
    assert spans["reduce", 1] == (9, 17.5)
    assert spans["reduce", 2] == (17.5, 26)
    assert done.seconds == 26


def test_slow_ranks_and_links_by_hand():
    plans = pair((1, 1))
    slow = simulate(SIMPLE, plans, ONE, False, Scenario(ranks={1: 3.0}))
    assert slow.ends == [5.5, 7.5]
    assert simulate(SIMPLE, plans, ONE, False, Scenario(links={(1, "node"): 2.0})).seconds == 9.5
    assert simulate(SIMPLE, plans, ONE, False, Scenario(links={(1, "network"): 2.0})).seconds == 5.5
    apart = replace(SIMPLE, gpus_per_node=1)  # half the bandwidth
    assert simulate(apart, plans, ONE, False).seconds == 9.5
    assert simulate(apart, plans, ONE, False, Scenario(links={(0, "network"): 2.0})).seconds == 17.5


def test_kernels_lose_time_to_the_transfers_beside_them():
    """A byte costs the kernels beside it a quarter of a second: 4 bytes one second, if they run all the while."""
    links = {key: replace(link, disturbance=0.25) for key, link in SIMPLE.links.items()}
    disturbed = replace(SIMPLE, links=links)
    spans = {span[:2]: span[2:] for span in timeline(simulate(disturbed, pair((1, 1)), ONE, False), 0)}
    assert spans["compute", 0] == pytest.approx((0, 1 + 1 / 4.5))  # one second of the 4.5 was beside it
    assert spans["compute", 1] == (4.5, 5.5)
    slow = replace(disturbed, rates=tuple(replace(rate, launch_seconds=10.0) for rate in SIMPLE.rates))
    assert simulate(slow, pair((1, 1)), ONE, False).seconds == 11 + 10
    unequal = simulate(slow, pair((1, 3)), ONE, False)  # 12 bytes in 12.5 s, of which 10 are beside the kernel
    assert timeline(unequal, 1)[0] == ("compute", 0, 0, 10 + 3 * 10 / 12.5)
    assert unequal.seconds == 12.5 + 10
    back = simulate(slow, pair((1, 1)), ONE, True)  # the cast before all kernels, the reduce beside the local one
    assert back.seconds == 4.5 + 10 + 10 + 2


def test_a_port_serves_one_message_at_a_time():
    """Ranks 1 and 2 send rank 0 a row each: its port takes them one after the other."""
    send = Stage((CALL,), sends=(Message(0, ((0, 1),)),))
    receive = Stage((CALL,), 2, receives=(Message(1, ((0, 1),)), Message(2, ((1, 2),))))
    plans = [
        AttentionPlan("gather", 3, rank, 2, ((0, 2),), (Stage((CALL,)), stage), (0, 0), (0, 0))
        for rank, stage in enumerate((receive, send, send))
    ]
    done = simulate(SIMPLE, plans, ONE, backward=False)
    assert done.ends == [9.5, 5.5, 9.5]


MESHES = st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 4]))
LENGTHS = st.lists(st.integers(1, 400), min_size=1, max_size=6)
SHAPE = Shape(4, 2, 1, 1, 2)
MASKS = st.sampled_from([Mask(), Mask(causal=False), Mask(window=(30, 0)), Mask(chunk=50)])
SCHEMES = st.sampled_from(["auto", "gather", "joint", "ring"])


def group(lengths, mesh, scheme="auto", mask=Mask(), machine=SIMPLE, chunks=1):
    ring, ulysses = mesh
    layout = Layout(Documents(lengths), MeshShape(1, ring, ulysses), mask=mask)
    options = AttentionOptions(mask, scheme=scheme if ring > 1 else "auto", head_chunks=chunks)
    return plan_group(layout.parts[0], SHAPE, options, machine)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, MESHES, SCHEMES, MASKS)
def test_the_group_is_what_every_rank_plans(lengths, mesh, scheme, mask):
    ring, ulysses = mesh
    plans = group(lengths, mesh, scheme, mask)
    assert len(plans) == ring * ulysses
    for rank, plan in enumerate(plans):
        layout = Layout(Documents(lengths), MeshShape(1, ring, ulysses, rank), mask=mask)
        asked = scheme if ring > 1 else "auto"
        assert plan == plan_attention(layout, Shape(4, 2, 1, 1), AttentionOptions(mask, scheme=asked), SIMPLE)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, MESHES, SCHEMES, MASKS, st.booleans(), st.sampled_from([1, 4, 8]), st.sampled_from([1, 2]))
def test_what_no_schedule_can_beat(lengths, mesh, scheme, mask, backward, gpus_per_node, chunks):
    machine = replace(SIMPLE, gpus_per_node=gpus_per_node)
    plans = group(lengths, mesh, scheme, mask, machine, chunks)
    done = simulate(machine, plans, SHAPE, backward)
    for rank in range(len(plans)):
        for kinds in (("compute",), ("cast", "reduce"), ("exchange",)):
            times = sorted((s.begin, s.end) for s in done.spans if s.rank == rank and s.kind in kinds)
            assert all(one[1] <= other[0] + 1e-9 for one, other in pairwise(times))
        assert done.ends[rank] >= done.busy("compute")[rank] - 1e-9
    walked = [plan.for_pass(backward) for plan in plans]
    for port in port_seconds(machine, walked, backward).values():
        assert done.seconds >= port - 1e-6
    if gpus_per_node == 1 or len(plans) <= gpus_per_node:  # else a message may leave through another GPU's port
        cost = plan_cost(machine, plans, SHAPE)
        assert done.seconds >= (cost.backward if backward else cost.forward).seconds - 1e-6


def port_seconds(machine: Machine, plans: list[AttentionPlan], backward: bool) -> dict[tuple[int, str, str], float]:
    """Seconds that the bytes of all batches need through each receiving port."""
    traffic, total = Traffic(plans, SHAPE, backward), {}
    kinds = [
        "exchange",
        *(["cast"] if not (backward and plans[0].keep_keys) else []),
        *(["reduce"] if backward else []),
    ]
    batches = [batch for kind in kinds for batch in traffic.batches(kind)]
    for rank in range(len(plans)):
        for batch in batches:
            for peer, size in traffic.sent(batch, rank):
                link_class = machine.link_class(rank, peer)
                key = peer, link_class, "in"
                total[key] = total.get(key, 0.0) + size / machine.links[link_class, "p2p"].bandwidth
    return total


@settings(max_examples=40, deadline=None)
@given(LENGTHS, SCHEMES, st.booleans(), st.integers(0, 1), st.floats(1, 10))
def test_a_straggler_costs_at_most_what_it_is_slower(lengths, scheme, backward, slow, factor):
    """Two ranks have no contention, so the longest path decides: it has each call of the straggler at most once."""
    plans = group(lengths, (2, 1), scheme)
    normal = simulate(SIMPLE, plans, SHAPE, backward)
    slower = simulate(SIMPLE, plans, SHAPE, backward, Scenario(ranks={slow: factor}))
    work = normal.busy("compute")[slow]
    assert slower.seconds >= max(normal.seconds, factor * work) - 1e-9
    assert slower.seconds <= normal.seconds + (factor - 1) * work + 1e-9


@settings(max_examples=60, deadline=None)
@given(LENGTHS, MESHES, SCHEMES, st.booleans())
def test_what_is_sent_is_received(lengths, mesh, scheme, backward):
    plans = group(lengths, mesh, scheme)
    traffic = Traffic(plans, SHAPE, backward)
    casts = traffic.batches("cast")
    assert len(casts) == len(plans[0].stages) - 1
    for cast in casts:
        for rank, plan in enumerate(plans):
            sent = sum(size for _, size in traffic.sent(cast, rank))
            own, stage = SHAPE.share(plan.exchange), plan.stages[cast.stage]
            assert sent == sum(message.rows for message in stage.sends) * own.key_row_bytes
            assert {peer for peer, _ in traffic.sent(cast, rank)} <= set(traffic.peers(cast, rank))
            arrives = [size for other in range(len(plans)) for peer, size in traffic.sent(cast, other) if peer == rank]
            assert sum(arrives) == sum(message.rows for message in stage.receives) * own.key_row_bytes
    if traffic.ulysses > 1:
        tokens = sum(lengths)
        row = 2 * (4 + (2 if traffic.ulysses <= 2 else 4) * 2)  # bytes of a token's queries, keys and values
        everything = sum(
            size for rank in range(len(plans)) for _, size in traffic.sent(BatchKey("exchange", int(backward)), rank)
        )
        assert everything <= tokens * row * (2 if backward else 1)
        assert everything == pytest.approx(
            sum(
                (stop - start) * own_bytes
                for rank, plan in enumerate(plans)
                for peer, (start, stop) in enumerate(plan.exchange.rows)
                if peer != plan.exchange.rank
                for own_bytes in [exchanged_row(plan, backward)]
            )
        )


def exchanged_row(plan: AttentionPlan, backward: bool) -> float:
    """Bytes of one token's queries, keys and values of this rank's heads, or of their gradients."""
    own = SHAPE.share(plan.exchange)
    wide = 4 if backward and plan.exchange.copied_keys else 2
    return own.query_heads * 2 + own.key_heads * 2 * wide


def test_what_kernels_pull_is_waited_for():
    """As its price says, so that both name one schedule the faster; and for the other rank, too."""
    machine, shape = SHIPPED["H200"].by_copy_engines().captured(), Shape(32, 8, 128, 128)
    layouts = [Layout(Documents([4096] * 3 + [1000] * 2), MeshShape(1, 2, 1, rank), "balanced") for rank in range(2)]
    for scheme in ("gather", "joint"):
        plans = [
            plan_attention(layout, Shape(32, 8, 128, 128), AttentionOptions(scheme=scheme), machine)
            for layout in layouts
        ]
        for backward in (False, True):
            priced = max(
                getattr(rank_cost(machine, plan, shape), "backward" if backward else "forward").seconds
                for plan in plans
            )
            assert priced * (1 - 1e-9) <= max(simulate(machine, plans, shape, backward).ends) <= 1.05 * priced
