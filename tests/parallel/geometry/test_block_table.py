"""Columns of blocks against the blocks that are cut one by one."""

import numpy as np
from hypothesis import given

from ringattn.kernels.spec import Call
from ringattn.mask import Band
from ringattn.parallel.geometry.block_table import BlockTable, needs
from ringattn.parallel.geometry.blocks import Piece, blocks_of
from tests.parallel.geometry.pairs import BANDS, allowed, queries_and_runs, seen


@given(problem=queries_and_runs(), band=BANDS)
def test_areas_are_the_numbers_of_allowed_pairs(problem: tuple[Piece, list[Piece]], band: Band) -> None:
    blocks = blocks_of(*problem, band)
    calls = [Call((block,), block.left, block.right) for block in blocks]
    table = BlockTable.of(calls)
    assert table.areas.tolist() == [len(allowed([block])) for block in blocks]
    assert table.where(table.m > 2).areas.sum() == sum(
        len(allowed([block])) for block in blocks if block.k[1] - block.k[0] > 2
    )


@given(problem=queries_and_runs(), band=BANDS)
def test_columns_are_cut_as_blocks_are(problem: tuple[Piece, list[Piece]], band: Band) -> None:
    query, runs = problem
    for run in runs:
        first = run.first if band.lo is None else max(run.first, query.first + band.lo)
        last = run.last if band.hi is None else min(run.last, query.last + band.hi)
        blocks = blocks_of(query, [run], band)
        assert len(blocks) == (first < last)
        for block in blocks:
            table = BlockTable.cut(*(np.array([bound]) for bound in (query.first, query.last, first, last)), band)
            sizes = block.q[1] - block.q[0], block.k[1] - block.k[0]
            assert (table.n[0], table.m[0], table.left[0], table.right[0]) == (*sizes, block.left, block.right)


@given(problem=queries_and_runs(), band=BANDS)
def test_needed_keys_are_all_that_some_query_sees(problem: tuple[Piece, list[Piece]], band: Band) -> None:
    query, _ = problem
    length = query.last + 5
    lo, hi = (int(x[0]) for x in needs(np.array([query.first]), np.array([query.last]), np.array([length]), band))
    keys = {key for _, key in seen(query, [Piece(0, 0, length, 0)], band)}
    assert set(range(lo, hi)) == keys
    assert set(range(*band.keys_of(query.first, query.last, length))) == keys
