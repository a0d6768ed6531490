"""Plans of trees and blocks against brute force: every allowed pair once, no key in vain, none twice."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn import Documents, Layout, Mask, MeshShape
from ringattn.drawing import picture
from ringattn.parallel.planning.agreement import common_digest
from ringattn.parallel.planning.ahead import Attention, from_bytes, plan_ahead, to_bytes
from ringattn.parallel.planning.planner import plan_attention, plan_parts
from ringattn.parallel.schedules import demand
from ringattn.parallel.schedules.gather import Gather
from ringattn.settings import AttentionOptions
from tests.parallel.planning.brute_force import SHAPE, check_routes, pairs_computed, plans_of
from tests.strategies import segment_masks, segmented_documents

POLICIES = st.sampled_from(["contiguous", "zigzag", "balanced"])


@settings(max_examples=100, deadline=None)
@given(
    docs=segmented_documents(),
    mask=segment_masks,
    ring=st.integers(1, 5),
    policy=POLICIES,
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


@settings(max_examples=50, deadline=None)
@given(
    docs=segmented_documents(),
    mask=segment_masks,
    ring=st.integers(2, 5),
    policy=POLICIES,
    scheme=st.sampled_from(["gather", "joint", "ring"]),
)
def test_only_needed_keys_travel_each_once(docs: Documents, mask: Mask, ring: int, policy: str, scheme: str) -> None:
    dense = docs.dense(mask)
    for layout, plan in plans_of(docs, mask, ring, policy, scheme, None):
        own = layout.indices()
        needed = set(dense[own].any(0).nonzero().flatten().tolist()) - set(own.tolist())
        received = []
        for stage in plan.stages[1:]:
            tokens = [token for start, stop in stage.index for token in range(start, stop)]
            received += [tokens[row] for message in stage.receives for span in message.ranges for row in range(*span)]
        assert sorted(received) == sorted(needed)


@settings(max_examples=60, deadline=None)
@given(
    docs=segmented_documents(),
    mask=segment_masks,
    ring=st.integers(2, 5),
    policy=POLICIES,
    scheme=st.sampled_from(["gather", "joint", "ring"]),
    stages=st.sampled_from([None, 2, 3]),
)
def test_routes_of_all_ranks_fit_together(
    docs: Documents, mask: Mask, ring: int, policy: str, scheme: str, stages: int | None
) -> None:
    check_routes(plans_of(docs, mask, ring, policy, scheme, stages if scheme == "ring" else None))


def test_completions_of_one_prompt_are_two_calls_and_share_its_keys() -> None:
    docs = Documents.from_tree([4096, *[1024] * 8], [-1, *[0] * 8])
    ((_, plan),) = plans_of(docs, Mask(), 1, "contiguous", "auto", None)
    causal, full = plan.stages[0].calls
    assert (causal.left, causal.right, causal.q) == (-1, 0, (0, docs.total))
    assert (full.left, full.right) == (-1, -1)
    assert [(block.q, block.k) for block in full.blocks] == [((5120, docs.total), (0, 4096))]
    for layout, plan in plans_of(docs, Mask(), 4, "balanced", "gather", None):
        assert plan.received_rows <= docs.total - layout.tokens()
        assert sum(len(stage.calls) for stage in plan.stages) <= 6


@pytest.mark.parametrize("images", [1, 20])
def test_blocks_of_many_images_are_one_call_beside_the_causal_one(images: int) -> None:
    docs = Documents([images * 400], blocks=[(at * 400 + 50, at * 400 + 306) for at in range(images)])
    for mask in (Mask(), Mask(window=(500, 0), blocks="clipped")):
        ((_, plan),) = plans_of(docs, mask, 1, "contiguous", "auto", None)
        assert len(plan.stages[0].calls) == 2


def test_a_schedule_that_does_not_know_segments_is_refused() -> None:
    layout = Layout(Documents([50], blocks=[(3, 9)]), MeshShape(1, 2))
    with mock.patch.object(Gather, "segments", False), pytest.raises(NotImplementedError, match='scheme="gather" does'):
        plan_attention(layout, SHAPE, AttentionOptions(scheme="gather"))


def test_a_mask_that_segments_do_not_go_with_is_refused_as_it_is_planned() -> None:
    layout = Layout(Documents([50], blocks=[(3, 9)]), MeshShape(1, 2))
    with pytest.raises(ValueError, match="mask must be causal and without a chunk"):
        plan_attention(layout, SHAPE, AttentionOptions(mask=Mask(chunk=8)))


def test_ranks_with_other_segments_do_not_agree() -> None:
    found = set()
    for docs in (
        Documents([60]),
        Documents([60], blocks=[(3, 9)]),
        Documents.from_tree([40, 10, 10], [-1, 0, 0]),
        Documents.from_tree([40, 10, 10], [-1, 0, 1]),
    ):
        layout = Layout(docs, MeshShape(1, 2), "contiguous")
        found.add(common_digest(plan_parts(layout, SHAPE), layout))
    assert len(found) == 4


def test_plans_made_ahead_are_those_of_the_layout() -> None:
    docs = Documents.from_tree([40, 10, 12], [-1, 0, 0], blocks=[(3, 9)])
    mesh = MeshShape(1, 2)
    layout = Layout(docs, mesh)
    plans = plan_ahead(layout, [Attention(SHAPE, AttentionOptions())])
    there, read = from_bytes(to_bytes((layout, plans)), mesh)
    assert there.docs == docs
    assert [plan.parts[0][1] for _, plan in read] == [plan_attention(Layout(docs, mesh), SHAPE)]


def test_pictures_show_the_mask() -> None:
    docs = Documents.from_tree([12, 6, 5, 9], [-1, 0, 0, -1], blocks=[(2, 7), (25, 30)], total=34)
    for mask in (Mask(), Mask(window=(4, 0)), Mask(window=(4, 0), blocks="clipped")):
        plans = [plan for _, plan in plans_of(docs, mask, 3, "zigzag", "gather", None)]
        drawn = [[sign != "." for sign in line] for line in picture(plans, docs.total).splitlines()]
        assert drawn == docs.dense(mask).tolist()
