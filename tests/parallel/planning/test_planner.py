"""Plans against brute force: every allowed pair computed once, every received row needed, both ends agree."""

import time
from collections import Counter
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn import Documents, Layout, Mask, MeshShape
from ringattn.parallel.placement.pieces import TILE, inner_rows
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.planner import plan_attention, plan_parts
from ringattn.parallel.schedules import demand
from ringattn.settings import AttentionOptions
from tests.parallel.planning.brute_force import SHAPE, check_routes, pairs_computed, plans_of
from tests.strategies import documents, masks


@settings(max_examples=120)
@given(
    docs=documents(longest=60, most=7),
    mask=masks,
    ring=st.integers(1, 6),
    policy=st.sampled_from(["contiguous", "zigzag", "balanced"]),
    scheme=st.sampled_from(["gather", "joint", "ring", "auto"]),
    stages=st.sampled_from([None, 2, 3, 9]),
    backward=st.booleans(),
    repeated=st.sampled_from([0, 20, 10_000]),
)
def test_every_allowed_pair_is_computed_once(
    docs: Documents, mask: Mask, ring: int, policy: str, scheme: str, stages: int | None, backward: bool, repeated: int
) -> None:
    scheme = scheme if ring > 1 else "auto"
    with mock.patch.object(demand, "REPEATED", repeated):
        plans = plans_of(docs, mask, ring, policy, scheme, stages if scheme == "ring" else None, backward)
    assert torch.equal(pairs_computed(plans, docs.total), docs.dense(mask).long())
    calls = [call for _, plan in plans for stage in plan.stages for call in stage.calls]
    assert all(call.blocks[0].q[0] == call.q[0] for call in calls)


@settings(max_examples=80)
@given(
    docs=documents(longest=80, most=7),
    mask=masks,
    ring=st.integers(2, 5),
    policy=st.sampled_from(["contiguous", "zigzag", "balanced"]),
)
def test_gather_computes_each_query_row_in_one_call(docs: Documents, mask: Mask, ring: int, policy: str) -> None:
    for _, plan in plans_of(docs, mask, ring, policy, "gather", None):
        rows = Counter(row for stage in plan.stages for call in stage.calls for row in range(*call.q))
        assert plan.shared_q == (0, 0)
        assert all(times == 1 for times in rows.values())


@settings(max_examples=80)
@given(
    docs=documents(longest=80, most=7),
    window=st.sampled_from([-1, 5, 30]),
    ring=st.integers(2, 6),
    policy=st.sampled_from(["contiguous", "zigzag", "balanced"]),
)
def test_joint_computes_everything_in_one_call(docs: Documents, window: int, ring: int, policy: str) -> None:
    mask = Mask(window=(window, 0 if window >= 0 else -1))
    for _, plan in plans_of(docs, mask, ring, policy, "joint", None):
        local, later = plan.stages
        assert not local.calls
        # Rows of no document are between two calls: one skips rows only if its results are added up.
        covered = sorted(row for call in later.calls for row in range(*call.q))
        assert len(later.calls) == len({row - number for number, row in enumerate(covered)})
        assert later.single_parts


@settings(max_examples=80)
@given(
    docs=documents(longest=80, most=7),
    mask=masks,
    ring=st.integers(2, 6),
    policy=st.sampled_from(["contiguous", "zigzag", "balanced"]),
    scheme=st.sampled_from(["gather", "joint"]),
)
def test_no_key_travels_twice(docs: Documents, mask: Mask, ring: int, policy: str, scheme: str) -> None:
    for _, plan in plans_of(docs, mask, ring, policy, scheme, None):
        later = plan.stages[1]
        tokens = [token for start, stop in later.index for token in range(start, stop)]
        received = [tokens[row] for message in later.receives for span in message.ranges for row in range(*span)]
        assert len(set(received)) == len(received)
        assert later.repeated_keys == (len(set(tokens)) < len(tokens))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("longest", "gather"), [(300, 2), (3000, 3)])
def test_many_cut_documents_are_few_calls(causal: bool, longest: int, gather: int) -> None:
    """One for pieces that are local and one for the others; where too much would stand twice in the buffer, one for
    each of the two pieces of a document."""
    docs = Documents([longest * number // 60 for number in range(1, 61)])
    for scheme, most in (("gather", gather), ("joint", 1)):
        for _, plan in plans_of(docs, Mask(causal=causal), 8, "zigzag", scheme, None):
            assert sum(len(stage.calls) for stage in plan.stages) <= most
            stands_twice = sum(target[1] - target[0] for _, target in plan.stages[1].repeats)
            assert scheme == "joint" or stands_twice <= demand.REPEATED


@settings(max_examples=60)
@given(
    docs=documents(longest=60, most=7),
    mask=masks,
    ring=st.integers(2, 6),
    policy=st.sampled_from(["contiguous", "zigzag", "balanced"]),
    scheme=st.sampled_from(["gather", "joint", "ring"]),
    stages=st.sampled_from([None, 2, 3, 9]),
)
def test_routes_of_all_ranks_fit_together(
    docs: Documents, mask: Mask, ring: int, policy: str, scheme: str, stages: int | None
) -> None:
    """What a rank expects where in a peer's message buffer is what the peer sends there, and all know the largest."""
    plans = plans_of(docs, mask, ring, policy, scheme, stages if scheme == "ring" else None)
    check_routes(plans)
    for _, plan in plans:
        for stage in plan.stages[1:]:
            assert stage.cast.received == sum(message.rows for message in stage.receives) == stage.back.sent


def test_packed_documents_need_few_calls_and_messages() -> None:
    docs = Documents([4096] * 8 + [1024] * 32 + [70_000, 333])
    for _layout, plan in plans_of(docs, Mask(), 8, "balanced", "gather", None):
        assert sum(len(stage.calls) for stage in plan.stages) <= 3
        assert plan.received_rows <= 70_000  # only the cut document travels
        for messages in (plan.stages[-1].sends, plan.stages[-1].receives):
            assert len({message.peer for message in messages}) == len(messages)


def test_a_plan_prints_what_it_does() -> None:
    layout = Layout(Documents([1000, 40, 700]), MeshShape(1, 2, 2, 1))
    text = str(plan_attention(layout, Shape(6, 2, 128, 128), AttentionOptions(Mask(window=(100, 0)))))
    for words in (
        "ring position 0 of 2",
        "exchange",
        "query heads 3-5",
        "stage 0",
        "stage 1",
        "window 100,0",
        "because",
    ):
        assert words in text


def test_plans_are_kept_with_the_layout() -> None:
    layout = Layout(Documents([100, 30]), MeshShape(1, 2))
    assert plan_attention(layout, SHAPE) is plan_attention(layout, SHAPE)
    assert plan_attention(layout, SHAPE) is not plan_attention(layout, SHAPE, AttentionOptions(Mask(window=(3, 0))))


@pytest.mark.parametrize(
    ("shape", "scheme", "stages", "words"),
    [
        (MeshShape(1, 1, 4), "ring", None, ["ring > 1", "ring=1", "ulysses=4"]),
        (MeshShape(1, 2, 1), "ulysses", None, ["ring = 1", "ring=2"]),
        (MeshShape(1, 4, 1), "hybrid", None, ["ulysses > 1", "ulysses=1"]),
        (MeshShape(1, 4, 1), "zigzag", None, ["scheme must be one of", "'zigzag'"]),
        (MeshShape(1, 4, 1), "ring", 1, ["stages", ">= 2", "1"]),
        (MeshShape(1, 4, 1), "gather", 3, ["stages=3", "gather"]),
    ],
)
def test_refusals_name_the_numbers(shape: MeshShape, scheme: str, stages: int | None, words: list[str]) -> None:
    with pytest.raises(ValueError, match=words[0]) as error:
        plan_attention(Layout(Documents([64]), shape), SHAPE, AttentionOptions(scheme=scheme, stages=stages))
    assert all(word in str(error.value) for word in words)


def test_planning_a_thousand_documents_on_64_ranks_is_quick() -> None:
    """Not a benchmark: the stated 50 ms with a factor of ten for a busy machine."""
    lengths = [64 + (index * 7919) % 4000 for index in range(999)] + [500_000]
    best = float("inf")
    for rank in (0, 31, 63):
        begin = time.perf_counter()
        plan_attention(Layout(Documents(lengths), MeshShape(1, 64, 1, rank)), Shape(32, 8, 128, 128))
        best = min(best, time.perf_counter() - begin)
    assert best < 0.5


@settings(max_examples=200)
@given(
    length=st.integers(1, 2000),
    ends=st.tuples(st.integers(0, 2000), st.integers(0, 2000)),
    left=st.one_of(st.just(-1), st.integers(0, 600)),
    right=st.one_of(st.just(-1), st.integers(0, 600)),
)
def test_inner_rows_see_no_key_outside_of_their_piece(
    length: int, ends: tuple[int, int], left: int, right: int
) -> None:
    band = Mask(causal=False, window=(left, right)).band
    first, last = sorted(min(end, length) for end in ends)
    begin, end = inner_rows(first, last, length, band)
    assert first <= begin <= end <= last
    seen = band.keys_of(begin, end, length)
    assert begin == end or (first <= seen[0] and seen[1] <= last)
    # Of the rows before and after, all but a part of a tile see something outside.
    if begin < end:
        for row in (begin - TILE, end + TILE - 1):
            if first <= row < last:
                lo, hi = band.keys_of(row, row + 1, length)
                assert lo < first or hi > last


def test_a_window_waits_for_its_edges_only() -> None:
    layout = Layout(Documents([40_000]), MeshShape(1, 4, 1, 1), "contiguous")
    plan = plan_attention(layout, SHAPE, AttentionOptions(Mask(window=(1000, 0)), scheme="gather"))
    (local,), (edge,) = plan.stages[0].calls, plan.stages[1].calls
    assert local.q == (1024, 10_000)
    assert edge.q == (0, 1024)
    assert plan.received_rows == 1000
    assert plan.stages[1].rows == 1000 + 1024


def test_the_plan_of_a_layout_that_is_not_parted_is_its_only_part() -> None:
    layout = Layout(Documents([100, 30]), MeshShape(1, 2))
    for shape in (SHAPE, Shape(4, 2, 64, 64, itemsize=4)):
        for options in (
            AttentionOptions(),
            AttentionOptions(memory_limit=2**30),
            AttentionOptions(scheme="ring", stages=2, keep_keys=True, wide_reduce=False),
        ):
            parted = plan_parts(layout, shape, options)
            assert plan_attention(layout, shape, options) is parted.parts[0][1]


def test_a_plan_serves_all_options_that_it_does_not_depend_on() -> None:
    """Layers of a model may differ in them, and planning takes time."""
    layout = Layout(Documents([100, 30]), MeshShape(1, 2))
    plan = plan_attention(layout, SHAPE)
    others = {"softmax_scale": 0.5, "softcap": 30.0, "dropout_p": 0.1, "dropout_seed": 1, "return_lse": True}
    others |= {"deterministic": True, "backend": "reference"}
    for name, value in others.items():
        assert plan_attention(layout, SHAPE, AttentionOptions(**{name: value})) is plan
    for name, value in {"scheme": "gather", "keep_keys": True, "wide_reduce": False, "memory_limit": 2**30}.items():
        assert plan_attention(layout, SHAPE, AttentionOptions(**{name: value})) is not plan
