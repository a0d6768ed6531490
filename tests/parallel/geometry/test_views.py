"""Views of branches against the dense mask, pair by pair."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn import Documents, Mask
from ringattn.parallel.geometry.blocks import Piece
from ringattn.parallel.geometry.views import bends_of, slope_of, table_of, views_of
from tests.parallel.geometry.pairs import allowed
from tests.strategies import segment_masks, segmented_documents


@settings(max_examples=150)
@given(docs=segmented_documents(), mask=segment_masks, data=st.data())
def test_views_hold_every_pair_once(docs: Documents, mask: Mask, data: st.DataObject) -> None:
    count = torch.zeros(docs.total, docs.total, dtype=torch.int64)
    for branch in docs.branches:
        tokens = [run.start + index for run in branch.path for index in range(run.last - run.first)]
        cut = data.draw(st.integers(branch.first, branch.last))
        for first, last in ((branch.first, cut), (cut, branch.last)):
            if first == last:
                continue
            for view in views_of(branch, Piece(0, first, last, first), mask):
                seen = set()
                for row, key in allowed(view.blocks([Piece(0, 0, branch.last, 0)])):
                    count[tokens[row], tokens[key]] += 1
                    seen.add(key)
                assert seen == set(range(*view.keys))
    assert torch.equal(count, docs.dense(mask).long())


@settings(max_examples=150)
@given(docs=segmented_documents(), mask=segment_masks)
def test_areas_in_closed_form_and_the_bends_between_which_they_are_linear(docs: Documents, mask: Mask) -> None:
    sums = docs.dense(mask).sum(1).tolist()
    for branch in docs.branches:
        tokens = [run.start + index for run in branch.path for index in range(run.last - run.first)]
        bends = sorted(bends_of(branch, mask))
        parts = [(branch, first, last) for first, last in pairwise(bends)]
        table, owner = table_of(parts, mask)
        areas = [int(table.areas[owner == number].sum()) for number in range(len(parts))]
        for area, (_, first, last) in zip(areas, parts, strict=True):
            counts = [sums[tokens[position]] for position in range(first, last)]
            assert area == sum(counts)
            slope = slope_of(branch, first, last, mask)
            assert all(b - a == slope for a, b in pairwise(counts))
