"""Documents with segments and blocks against their definition, pair by pair, and what they refuse."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn import Documents, Layout, Mask, MeshShape
from tests.strategies import documents, segment_masks, segmented_documents


def path_of(docs: Documents, token: int) -> list[int]:
    """All tokens on the way from the root of a token's document to it, by walking up its segments."""
    for segment in docs.segments:
        if segment.start <= token < segment.stop:
            above = path_of(docs, docs.segments[segment.parent].stop - 1) if segment.parent >= 0 else []
            return [*above, *range(segment.start, token + 1)]
    for start, size in zip(docs.starts, docs.lengths, strict=True):
        if start <= token < start + size:
            return list(range(start, token + 1))
    return []


def seen_by(docs: Documents, mask: Mask, query: int) -> set[int]:
    """By the words of `Documents` and `Mask`: the path inside of the window, and the query's block."""
    path = path_of(docs, query)
    block = next((set(range(*block)) for block in docs.blocks if block[0] <= query < block[1]), set())
    left = len(path) if mask.window[0] < 0 else mask.window[0]
    seen = set(path[max(0, len(path) - 1 - left) :])
    if mask.blocks == "ignored":
        return seen
    if mask.blocks == "whole":
        return seen | block
    return seen | {key for key in block if key >= query - left}


@settings(max_examples=150)
@given(docs=segmented_documents(), mask=segment_masks)
def test_dense_is_the_rule_pair_by_pair(docs: Documents, mask: Mask) -> None:
    dense = docs.dense(mask)
    for query in range(docs.total):
        assert set(dense[query].nonzero().flatten().tolist()) == seen_by(docs, mask, query)


@given(docs=segmented_documents())
def test_positions_are_counted_along_paths(docs: Documents) -> None:
    inside = [len(path_of(docs, token)) - 1 for token in range(docs.total)]
    padding = {token: token - start for start, stop in docs.padding for token in range(start, stop)}
    expected = [padding.get(token, position) for token, position in enumerate(inside)]
    assert docs.position_ids().tolist() == expected
    layout = Layout(docs, MeshShape(1, 3, 1, 1), "zigzag")
    assert layout.position_ids().tolist() == [expected[token] for token in layout.indices().tolist()]


@given(docs=segmented_documents())
def test_branches_hold_every_token_once_with_its_path(docs: Documents) -> None:
    tokens = [token for branch in docs.branches for token in range(branch.start, branch.stop)]
    assert sorted(tokens) == [token for token in range(docs.total) if path_of(docs, token)]
    for branch in docs.branches:
        on_path = [token for run in branch.path for token in range(run.start, run.start + run.last - run.first)]
        assert on_path == path_of(docs, branch.stop - 1)
        assert [run.first for run in branch.path] == [0, *(run.last for run in branch.path[:-1])]


def test_segments_that_lie_end_to_end_are_one_branch() -> None:
    docs = Documents.from_tree([5, 3, 2, 4, 6], [-1, 0, 1, 0, -1])
    assert docs.lengths == (14, 6)
    assert [(branch.start, branch.stop, branch.first) for branch in docs.branches] == [
        (0, 10, 0),
        (10, 14, 5),
        (14, 20, 0),
    ]
    assert docs.position_ids().tolist() == [*range(10), *range(5, 9), *range(6)]


@given(docs=documents())
def test_plain_documents_have_no_segments(docs: Documents) -> None:
    tree = Documents.from_tree(docs.lengths, [-1] * len(docs), total=sum(docs.lengths))
    assert tree == Documents(docs.lengths)
    assert not tree.segmented
    assert torch.equal(tree.dense(Mask()), Documents(docs.lengths).dense(Mask()))


@given(docs=segmented_documents(), shift=st.integers(0, 5))
def test_selected_documents_see_what_they_saw(docs: Documents, shift: int) -> None:
    numbers = list(range(0, len(docs), 2))
    moved = docs.select(numbers, [docs.starts[number] + shift for number in numbers], docs.total + shift)
    kept = torch.zeros(docs.total, dtype=torch.bool)
    for number in numbers:
        kept[docs.starts[number] : docs.starts[number] + docs.lengths[number]] = True
    expected = docs.dense(Mask(window=(3, 0))) & kept
    assert torch.equal(moved.dense(Mask(window=(3, 0)))[shift:, shift:], expected)


def test_what_differs_in_segments_alone_is_not_equal() -> None:
    found = [
        Documents([10]),
        Documents([10], blocks=[(2, 5)]),
        Documents([10], blocks=[(2, 6)]),
        Documents.from_tree([4, 3, 3], [-1, 0, 0]),
        Documents.from_tree([4, 3, 3], [-1, 0, 1]),
    ]
    assert len(set(found)) == len(found)
    assert len({repr(docs) for docs in found}) == len(found)
    assert all(pickle.loads(pickle.dumps(docs)) == docs for docs in found)


def test_ids_of_blocks_and_types() -> None:
    docs = Documents([4, 4])
    expected = Documents([4, 4], blocks=[(1, 3), (5, 8)])
    assert Documents.from_block_ids([-1, 7, 7, -1, -1, 7, 7, 7], docs) == expected
    assert Documents.from_block_ids(torch.tensor([[-1, 0, 0, -1], [-1, 0, 0, 0]])) == expected
    assert Documents.from_token_type_ids([[0, 1, 1, 0], [0, 1, 1, 1]]) == expected
    assert Documents.from_token_type_ids([0, 1, 1, 0, 0, 1, 2, 1], docs, types=(1, 2)) == expected
    assert Documents.from_token_type_ids([0, 1, 1, 1, 1, 1, 1, 0], docs).blocks == ((1, 4), (4, 7))
    with pytest.raises(ValueError, match="block_ids must hold each block in one run: id 3 comes back at token 3"):
        Documents.from_block_ids([3, 3, -1, 3])


@pytest.mark.parametrize(
    ("lengths", "parents", "words"),
    [
        ([3, 2], [-1], "parents must have one entry for each of the 2 lengths, got 1"),
        ([3, 2], [-1, 1], r"parents\[1\] must be -1, or the number of a segment before it \(below 1\), got 1"),
        ([3, 2], [-2, 0], r"parents\[0\] must be -1"),
        ([3, 2, 2], [-1, -1, 0], r"parents\[2\] = 0 belongs to the tree of root 0, but root 1 began after it"),
        ([0, 2], [-1, 0], r"lengths\[0\] must be at least 1, or 0 for a root without children, got 0"),
        ([3, 0], [-1, 0], r"lengths\[1\] must be at least 1"),
    ],
)
def test_wrong_trees_are_refused(lengths: list[int], parents: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Documents.from_tree(lengths, parents)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"blocks": [(3, 6)]}, r"blocks\[0\] = \(3, 6\) must lie in one document"),
        (
            {"blocks": [(0, 3), (2, 4)]},
            r"blocks\[1\] must be \(start, stop\) that begins at or after .*, 3, got \(2, 4\)",
        ),
        ({"blocks": [(0, 3, 4)]}, r"blocks\[0\] must be 2 integers"),
        ({"blocks": [(8, 12)]}, r"blocks\[0\] = \(8, 12\) must lie in one document"),
        ({"segments": [(0, 2, -1), (2, 5, 0), (6, 10, -1)]}, r"segments\[2\].* must begin a document"),
        ({"segments": [(0, 2, -1), (3, 5, 0)]}, r"segments\[1\].* must follow the one before it"),
        (
            {"segments": [(0, 2, -1), (2, 4, 0)]},
            r"segments\[1\].* is the last of its document and must end with it, at 5",
        ),
        ({"segments": [(0, 5, -1), (5, 10, 0)]}, r"segments\[1\].* must hold tokens, and lie in the document"),
        ({"segments": [(0, 5, -1), (5, 7, -1), (7, 10, 0)]}, r"segments\[2\].* on a parent before it in its document"),
        ({"segments": [(0, 2, -1), (2, 5, 0)], "blocks": [(1, 3)]}, r"blocks\[0\] = \(1, 3\) must lie in one document"),
    ],
)
def test_wrong_segments_are_refused(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Documents([5, 5], **arguments)


@pytest.mark.parametrize("mask", [Mask(chunk=4), Mask(causal=False)])
def test_masks_that_segments_do_not_go_with_are_refused(mask: Mask) -> None:
    for docs in (Documents([10], blocks=[(2, 5)]), Documents.from_tree([4, 3], [-1, 0])):
        with pytest.raises(ValueError, match="mask must be causal and without a chunk"):
            docs.dense(mask)
        with pytest.raises(ValueError, match="mask must be causal and without a chunk"):
            Layout(docs, MeshShape(1, 2), mask=[(Mask(), 1), (mask, 2)])
    with pytest.raises(ValueError, match='blocks must be "whole", "clipped" or "ignored", got \'cut\''):
        Mask(blocks="cut")
