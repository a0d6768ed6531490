"""Arcs of a document whose cost per token rises and falls: every token once, and each share its part of the cost."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn import Documents, Layout, Mask, MeshShape
from ringattn.parallel.placement.arcs import arcs
from ringattn.parallel.placement.load import Load
from tests.parallel.placement.test_policies import assert_every_token_once, costs, long_lengths

SIDES = st.one_of(st.sampled_from([-1, 0, 64, 511, 1023, 4095]), st.integers(0, 9000))
WINDOWS = st.tuples(SIDES, SIDES)
MASKS = st.one_of(
    WINDOWS.map(lambda window: Mask(causal=False, window=window)),
    st.builds(lambda window, chunk: Mask(causal=False, window=window, chunk=chunk), WINDOWS, st.integers(1, 3000)),
    st.just(Mask()),
)


@given(
    size=st.integers(2, 4000),
    masks=st.lists(st.tuples(MASKS, st.sampled_from([1.0, 2.0, 5.0])), min_size=1, max_size=3),
    data=st.data(),
)
def test_every_arc_costs_what_its_tokens_do(size: int, masks: list[tuple[Mask, float]], data: st.DataObject) -> None:
    load = Load(tuple(masks))
    cuts = sorted(data.draw(st.sets(st.integers(1, size - 1), min_size=1, max_size=4)))
    owners = [(number, stop - start) for number, (start, stop) in enumerate(itertools.pairwise([0, *cuts, size]))]
    tile = data.draw(st.sampled_from([1, 16]))
    pieces = arcs(size, owners, tile, lambda position: load.pairs_of(position, size))
    assert sorted(token for _, first, last in pieces for token in range(first, last)) == list(range(size))

    def pairs(first: int, last: int) -> float:
        return load.pairs_of(last, size) - load.pairs_of(first, size)

    mean, dearest = pairs(0, size) / size, max(pairs(token, token + 1) for token in range(size))
    for number, tokens in owners:
        own = [(first, last) for position, first, last in pieces if position == number]
        assert sum(last - first for first, last in own) == tokens
        # Every arc begins at a tile, and what those before it took too much is shared by all that come after.
        error = abs(sum(pairs(*span) for span in own) - tokens * mean)
        assert error <= tile * dearest * len(owners)


@given(
    size=st.integers(1, 60),
    windows=st.lists(st.tuples(st.integers(-1, 70), st.integers(-1, 70)), min_size=1, max_size=3),
    chunk=st.one_of(st.none(), st.integers(1, 70)),
)
def test_pairs_before_a_position_are_those_of_the_mask(
    size: int, windows: list[tuple[int, int]], chunk: int | None
) -> None:
    masks = [(Mask(causal=False, window=window, chunk=chunk), 2.0**number) for number, window in enumerate(windows)]
    load = Load(tuple(masks))
    seen = sum(layers * mask.dense(size).sum(1) for mask, layers in masks)
    assert [load.pairs_of(token + 1, size) - load.pairs_of(token, size) for token in range(size)] == seen.tolist()


@settings(max_examples=60, deadline=None)
@given(case=long_lengths(8192), window=WINDOWS)
def test_windows_to_both_sides_at_8192_tokens_a_rank(case: tuple[int, list[int]], window: tuple[int, int]) -> None:
    """Cut in runs as if all tokens cost the same they were 1.2 of the mean, and 1.9 with one side open."""
    ring, lengths = case
    layout = Layout(Documents(lengths), MeshShape(1, ring), "balanced", Mask(causal=False, window=window))
    assert_every_token_once(layout)
    found = costs(layout)
    assert max(found) / (sum(found) / ring) <= 1.05
