"""Balance of documents whose tokens do not cost evenly more from one to the next: trees, blocks, layers with chunks."""

import itertools
from random import Random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ringattn import Documents, Layout, Mask, MeshShape
from ringattn.parallel.placement.linear_parts import document_costs, linear_parts, runs_costs
from ringattn.parallel.placement.load import Load
from tests.parallel.placement.test_policies import assert_every_token_once, costs
from tests.strategies import segment_masks, segmented_documents

LAYERS = (
    [(Mask(), 1)],
    [(Mask(window=(1023, 0)), 1)],
    [(Mask(), 1), (Mask(window=(511, 0), blocks="clipped"), 5)],
)


def pairs_of(docs: Documents, mask: Mask) -> np.ndarray:
    """Keys that each token sees, from its position and its block."""
    position = docs.position_ids().numpy()
    first, last = position.copy(), position + 1  # of the block on the path
    assert mask.blocks != "ignored"
    for start, stop in docs.blocks:
        first[start:stop], last[start:stop] = position[start], position[stop - 1] + 1
    left = position if mask.window[0] < 0 else np.minimum(position, mask.window[0])
    begin = position - left
    if mask.blocks == "whole":
        begin = np.minimum(begin, first)
    counts = last - begin
    for start, stop in docs.padding:
        counts[start:stop] = 0
    return counts


@st.composite
def long_trees(draw: st.DrawFn, share: int) -> tuple[int, Documents]:
    """A ring size, and trees, documents and blocks of `share` tokens a rank."""
    ring = draw(st.integers(2, 16))
    random = Random(draw(st.integers(0, 10**6)))
    total, longest = ring * share, share * draw(st.sampled_from([1, 2, 8]))
    images = draw(st.sampled_from([0, 0, 256, 3000]))
    branching = draw(st.floats(0, 0.95))
    lengths: list[int] = []
    parents: list[int] = []
    root, left = 0, total
    while left:
        length = min(left, max(1, int(longest ** random.uniform(0.4, 1))))
        child = lengths and random.random() < branching
        parents.append(random.randint(root, len(lengths) - 1) if child else -1)
        root = root if child else len(lengths)
        lengths.append(length)
        left -= length
    blocks, start = [], 0
    for length in lengths:
        at = 10
        while images and at + images <= length:
            blocks.append((start + at, start + at + images))
            at += images + random.choice([1, 40, 2000])
        start += length
    return ring, Documents.from_tree(lengths, parents, blocks)


def position_costs(layout: Layout, layers: list) -> list[int]:
    per_token = sum(count * pairs_of(layout.docs, mask) for mask, count in layers)
    before = np.concatenate([[0], np.cumsum(per_token)])
    return [sum(int(before[b] - before[a]) for a, b in ranges) for ranges in layout.positions]


@settings(max_examples=40, deadline=None)
@given(case=long_trees(8192), layers=st.sampled_from(LAYERS))
def test_balance_of_segments_at_8192_tokens_a_rank(case: tuple[int, Documents], layers: list) -> None:
    ring, docs = case
    assume(docs.segmented)
    layout = Layout(docs, MeshShape(1, ring), "balanced", layers)
    assert_every_token_once(layout)
    found = position_costs(layout, layers)
    assert max(found) / (sum(found) / ring) <= 1.05
    assert max(layout.position_sizes) <= 8192 * 1.05


@pytest.mark.parametrize("layers", LAYERS, ids=["dense", "window", "both"])
@pytest.mark.parametrize("ring", [2, 4, 8, 32])
def test_images_that_follow_each_other_evenly_cut_a_document_no_more_than_text_does(ring: int, layers: list) -> None:
    """Dealt by what tokens cost, all images of a document under a window were one rank's, and the text between them
    the other's: 84 runs each, at twice the time."""
    size = ring * 8192
    blocks = [(start, start + 256) for start in range(512, size - 256, 768)]
    docs = Documents.from_tree([size], [-1], blocks)
    layout = Layout(docs, MeshShape(1, ring), "balanced", layers)
    assert_every_token_once(layout)
    assert max(len(ranges) for ranges in layout.positions) <= 2
    found = position_costs(layout, layers)
    assert max(found) / (sum(found) / ring) <= 1.015
    assert max(layout.position_sizes) <= 8192 + 128


def test_documents_that_are_cut_between_the_same_positions_add_up() -> None:
    """Each was as even as it had to be by itself, and the position that had parts of several had 2.8 % too much."""
    layers = [(Mask(), 1), (Mask(window=(1023, 0)), 5)]
    blocks = [(65536 * number + 20_100, 65536 * number + 26_100) for number in range(5)]
    layout = Layout(Documents([65536] * 5, blocks=blocks), MeshShape(1, 3), "balanced", layers)
    found = position_costs(layout, layers)
    assert max(found) / (sum(found) / 3) <= 1.016


def test_what_is_little_for_a_fast_position_is_much_for_a_slow_one() -> None:
    """Its slack is of its own part: one of a tenth of the speed had 14 % too much."""
    layers, speeds = [(Mask(window=(1023, 0)), 1)], [1.0, 1.0, 1.0, 0.1]
    docs = Documents([65536], blocks=[(8292, 12388)])
    layout = Layout(docs, MeshShape(1, 4), "balanced", layers, speeds=speeds)
    times = [cost / speed for cost, speed in zip(position_costs(layout, layers), speeds, strict=True)]
    assert max(times) / (sum(position_costs(layout, layers)) / sum(speeds)) <= 1.02


@pytest.mark.parametrize("layers", LAYERS, ids=["dense", "window", "both"])
@pytest.mark.parametrize("ring", [2, 4, 8])
def test_text_beside_an_image_is_cut_as_it_is_alone(ring: int, layers: list) -> None:
    """One document with a block, and all others were cut in up to 2.6 times as many pieces."""
    lengths = [30000, 50000, 9000, 70000, 131072]
    alone = Layout(Documents(lengths), MeshShape(1, ring), "balanced", layers)
    beside = Layout(Documents([*lengths, 8], blocks=[(290_075, 290_078)]), MeshShape(1, ring), "balanced", layers)
    pieces = [sum(map(len, layout.positions)) for layout in (alone, beside)]
    assert pieces[1] <= pieces[0] + 1
    found = position_costs(beside, layers)
    assert max(found) / (sum(found) / ring) <= 1.016


def test_completions_of_a_prompt_that_cost_the_same_stay_whole() -> None:
    docs = Documents.from_tree([1, *[8192] * 8], [-1, *[0] * 8])
    layout = Layout(docs, MeshShape(1, 8), "balanced")
    assert layout.positions == tuple((span,) for span in itertools.pairwise([0, *range(8192, 65536, 8192), 65537]))


@settings(max_examples=100)
@given(docs=segmented_documents(), masks=st.lists(segment_masks, min_size=1, max_size=2))
def test_costs_of_parts_are_the_pairs_of_their_tokens(docs: Documents, masks: list[Mask]) -> None:
    load = Load(tuple((mask, float(number + 1)) for number, mask in enumerate(masks)))
    dense = sum((number + 1) * docs.dense(mask).sum(1) for number, mask in enumerate(masks)).tolist()
    numbers = [number for number, size in enumerate(docs.lengths) if size]
    whole = document_costs(docs, numbers, load)
    for number, cost in zip(numbers, whole, strict=True):
        parts = linear_parts(docs, number, load)
        start, size = docs.starts[number], docs.lengths[number]
        assert sorted(token for part in parts for token in range(*part[:2])) == list(range(start, start + size))
        assert sum(part.cost for part in parts) == cost
        for part in parts:
            tokens = dense[part.start : part.stop]
            assert part.cost == sum(tokens)
            steps = {b - a for a, b in itertools.pairwise(tokens)}
            assert len(steps) <= 1
            assert part.sloped or steps <= {0}


@settings(max_examples=100)
@given(docs=segmented_documents(), masks=st.lists(segment_masks, min_size=1, max_size=2), data=st.data())
def test_costs_of_runs_are_the_pairs_of_their_tokens(docs: Documents, masks: list[Mask], data: st.DataObject) -> None:
    load = Load(tuple((mask, float(number + 1)) for number, mask in enumerate(masks)))
    dense = sum((number + 1) * docs.dense(mask).sum(1) for number, mask in enumerate(masks)).tolist()
    for number, (start, size) in enumerate(zip(docs.starts, docs.lengths, strict=True)):
        cuts = sorted(data.draw(st.sets(st.integers(0, size), min_size=2, max_size=6))) if size else []
        runs = list(itertools.pairwise(cuts))
        found = runs_costs(docs, number, runs, load).tolist()
        assert found == [sum(dense[start + first : start + last]) for first, last in runs]


@pytest.mark.parametrize("long", [3, 10, 40, 100])
def test_documents_that_end_in_a_short_chunk_are_balanced(long: int) -> None:
    """The last chunk, of 979 tokens, is cheaper than the first."""
    ring = 34
    lengths = [3027] * long
    lengths += [278] * ((ring * 32768 - sum(lengths)) // 278)
    layout = Layout(Documents(lengths), MeshShape(1, ring), "balanced", [(Mask(), 2), (Mask(chunk=2048), 6)])
    found = costs(layout)
    assert max(found) / (sum(found) / ring) <= 1.01
