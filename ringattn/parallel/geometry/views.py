"""What queries of a branch see, as few bands: query rows, positions of keys on the branch's path, and a band over both.

A tree's branch sees its path as a causal document would. A block adds what the band leaves out: the keys after each of
its queries, and with a window what lies in the block but outside of the window's left edge. So all pairs are in exactly
one view, and blocks of many images are one variable-length call beside the causal one, merged by the lse.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ringattn.kernels.spec import Block, Range
from ringattn.mask import Band, Mask
from ringattn.parallel.geometry.block_table import BlockTable, Ints
from ringattn.parallel.geometry.blocks import Piece, blocks_of
from ringattn.segments import Branch


class View(NamedTuple):
    """Queries of a branch over keys of its path, by positions.

    Arguments:
        query: its `document` is the number of the branch.
        span: positions of the keys that count.
        band: allowed `k - q` in positions.
    """

    query: Piece
    span: Range
    band: Band

    @property
    def keys(self) -> Range:
        """Those that at least one query sees; perhaps none (start >= stop)."""
        lo, hi = self.band.lo, self.band.hi
        first = self.span[0] if lo is None else max(self.span[0], self.query.first + lo)
        last = self.span[1] if hi is None else min(self.span[1], self.query.last + hi)
        return first, last

    def blocks(self, runs: list[Piece]) -> list[Block]:
        """Its blocks over runs of keys at ascending positions, which may reach beyond those that count."""
        own = [_clipped(run, self.span) for run in runs if run.first < self.span[1] and self.span[0] < run.last]
        return blocks_of(self.query, own, self.band)


def _clipped(run: Piece, span: Range) -> Piece:
    first, last = max(run.first, span[0]), min(run.last, span[1])
    return Piece(run.document, first, last, run.row + first - run.first)


def views_of(branch: Branch, query: Piece, mask: Mask) -> Iterator[View]:
    """All that some queries of a branch see, each pair once: first what the mask's band allows, then more in blocks."""
    band = mask.band
    yield View(query, (0, branch.last), band)
    if mask.blocks == "ignored":
        return
    for block in branch.blocks_in(query.first, query.last):
        first, last = max(query.first, block[0]), min(query.last, block[1])
        rows = Piece(query.document, first, last, query.row + first - query.first)
        views = [View(rows, block, Band(1, None))]
        if mask.blocks == "whole" and band.lo is not None:
            views.append(View(rows, block, Band(None, band.lo - 1)))
        yield from (view for view in views if view.keys[0] < view.keys[1])


def bends_of(branch: Branch, mask: Mask) -> set[int]:
    """Positions of a branch at which the number of keys that a query sees begins to grow or fall at another rate."""
    found = {branch.first, branch.last}
    reach = None if mask.band.lo is None else -mask.band.lo
    if reach is not None:
        found.add(reach)
    for first, last in branch.blocks if mask.blocks != "ignored" else ():
        found |= {first, last}
        if reach is not None and mask.blocks == "whole":
            found.add(min(first + reach, last))
    return {bend for bend in found if branch.first <= bend <= branch.last}


def slope_of(branch: Branch, first: int, last: int, mask: Mask) -> int:
    """By how many keys more a query sees than the one before it, between two bends."""
    reach = None if mask.band.lo is None else -mask.band.lo
    slope = int(reach is None or last <= reach + 1)
    for block in branch.blocks_in(first, last) if mask.blocks != "ignored" else ():
        slope -= 1
        if reach is not None and mask.blocks == "whole" and first >= block[0] + reach:
            slope += 1
    return slope


def table_of(branches: list[tuple[Branch, int, int]], mask: Mask) -> tuple[BlockTable, Ints]:
    """The blocks of queries at positions `[first, last)` of branches, as columns, and for each the number of its
    queries in the list."""
    rows, owners = [], []
    for number, (branch, first, last) in enumerate(branches):
        for view in views_of(branch, Piece(0, first, last, 0), mask):
            for block in view.blocks([Piece(0, 0, branch.last, 0)]):
                rows.append((*block.lengths, block.left, block.right))
                owners.append(number)
    n, m, left, right = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    return BlockTable(n, m, left, right, np.zeros_like(n), 1), np.array(owners, dtype=np.int64)
