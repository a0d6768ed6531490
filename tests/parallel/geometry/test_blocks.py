"""Blocks and calls against the pairs of rows that a band allows, one by one."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from ringattn.kernels.spec import Block, Range
from ringattn.mask import Band
from ringattn.parallel.geometry.blocks import Piece, blocks_of, group_calls, join_full, shared_rows
from tests.parallel.geometry.pairs import BANDS, allowed, queries_and_runs, seen

SPANS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 8)).map(lambda x: (x[0], x[0] + x[1])), max_size=5)


@st.composite
def stages(draw: st.DrawFn) -> list[Block]:
    """Blocks of several documents under one band, by query rows."""
    band, blocks, row, key = draw(BANDS), [], 0, 0
    for document in range(draw(st.integers(1, 4))):
        query, runs = draw(queries_and_runs(row, key, document))
        blocks += blocks_of(query, runs, band)
        row = query.stop_row + draw(st.sampled_from([0, 0, 2]))
        key = runs[-1].stop_row if runs else key
    return blocks


@given(problem=queries_and_runs(row=3, key=5), band=BANDS)
def test_blocks_allow_every_pair_of_the_band_once(problem: tuple[Piece, list[Piece]], band: Band) -> None:
    query, runs = problem
    blocks = blocks_of(query, runs, band)
    assert sorted(allowed(blocks)) == sorted(seen(query, runs, band))
    assert all(block.q[0] < block.q[1] and block.k[0] < block.k[1] for block in blocks)


@given(blocks=stages())
def test_joined_blocks_allow_the_same_pairs(blocks: list[Block]) -> None:
    joined = join_full(blocks)
    assert sorted(allowed(joined)) == sorted(allowed(blocks))
    assert len(joined) <= len(blocks)


@given(blocks=stages(), shared=SPANS)
def test_calls_allow_the_same_pairs_in_the_order_that_kernels_take(blocks: list[Block], shared: list[Range]) -> None:
    rows = shared_rows(shared)
    calls = group_calls(blocks, rows)
    found = [pair for call in calls for pair in allowed(call.blocks, [(call.left, call.right)] * len(call.blocks))]
    assert sorted(found) == sorted(allowed(blocks))
    for call in calls:
        assert all(a.q[1] == b.q[0] and a.k[1] <= b.k[0] for a, b in pairwise(call.blocks))
        for block in call.blocks:
            if block.k[0] == block.k[1]:  # rows that the call skips: nothing is added to them, where sums are kept
                assert rows[0] <= block.q[0] < block.q[1] <= rows[1]


@given(spans=SPANS, always=SPANS)
def test_shared_rows_are_those_of_two_spans(spans: list[Range], always: list[Range]) -> None:
    always = [span for span in always if span[0] < span[1]]
    covered = [row for span in spans for row in range(*span)]
    rows = {row for row in covered if covered.count(row) > 1} | {row for span in always for row in range(*span)}
    assert shared_rows(spans, always) == ((min(rows), max(rows) + 1) if rows else (0, 0))
