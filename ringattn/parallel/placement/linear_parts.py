"""Parts of documents in which the cost of a token grows or falls evenly: heads and tails of such a part cost what its
tokens do on the mean, however they are nested.

A causal document is one such part. A tree has one for each branch at least, since each begins at another position, and
blocks, windows and masks that are not the same in all layers bend the cost further.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from ringattn.documents import Documents
from ringattn.kernels.spec import Range
from ringattn.mask import Mask
from ringattn.parallel.geometry.block_table import Floats, Ints
from ringattn.parallel.geometry.views import bends_of, slope_of, table_of
from ringattn.parallel.placement.load import Load
from ringattn.segments import Branch, PathRun

Rows = tuple[Branch, int, int]  # queries at positions `[first, last)` of a branch


class LinearPart(NamedTuple):
    """Tokens `[start, stop)` of the stream."""

    start: int
    stop: int
    cost: float
    sloped: bool  # the cost of its tokens is not all the same


def rows_costs(rows: list[Rows], load: Load) -> Floats:
    """The cost of some queries of branches; where masks have chunks, of queries that lie in one of them."""
    total = np.zeros(len(rows))
    for mask, layers in load.masks:
        plain = replace(mask, chunk=None)
        table, owner = table_of([_in_chunk(one, mask) for one in rows], plain)
        total += layers * np.bincount(owner, load.table_costs(table), len(rows))
    return total


def document_costs(docs: Documents, numbers: list[int], load: Load) -> Floats:
    """The cost of whole documents, which are not cut in chunks."""
    rows = [(number, branch) for number in numbers for branch in docs.branches_of(number)]
    costs = rows_costs([(branch, branch.first, branch.last) for _, branch in rows], load)
    owner = np.searchsorted(np.array(numbers), np.array([number for number, _ in rows], dtype=np.int64))
    return np.bincount(owner, costs, len(numbers)).astype(np.float64)


def runs_costs(docs: Documents, number: int, runs: Sequence[Range], load: Load) -> Floats:
    """The cost of runs of one document's tokens, counted from its first, under masks without chunks."""
    rows: list[Rows] = []
    owner: list[int] = []
    start, branches = docs.starts[number], docs.branches_of(number)
    stops = [branch.stop for branch in branches]  # ascending
    for index, (first, last) in enumerate(runs):
        touched = slice(bisect_right(stops, start + first), bisect_left(stops, start + last) + 1)
        for branch in branches[touched]:
            begin, end = max(start + first, branch.start), min(start + last, branch.stop)
            rows.append((branch, branch.first + begin - branch.start, branch.first + end - branch.start))
            owner.append(index)
    return np.bincount(np.array(owner, dtype=np.int64), rows_costs(rows, load), len(runs)).astype(np.float64)


def linear_parts(docs: Documents, number: int, load: Load) -> list[LinearPart]:
    """The parts of one document, in the order of the stream."""
    rows: list[Rows] = []
    for branch in docs.branches_of(number):
        bends = set().union(*(_bends(branch, mask) for mask, _ in load.masks))
        rows += [(branch, first, last) for first, last in pairwise(sorted(bends))]
    costs = rows_costs(rows, load).tolist()
    return [
        LinearPart(
            branch.start + first - branch.first,
            branch.start + last - branch.first,
            cost,
            bool(sum(layers * slope_of(*_in_chunk((branch, first, last), mask), mask) for mask, layers in load.masks)),
        )
        for (branch, first, last), cost in zip(rows, costs, strict=True)
    ]


@dataclass(frozen=True)
class UnevenDocument:
    """What the tokens of one document cost, counted from its first; parts are made when they are first asked for."""

    docs: Documents
    number: int
    load: Load

    @cached_property
    def parts(self) -> list[LinearPart]:
        return linear_parts(self.docs, self.number, self.load)

    def costs(self, runs: Sequence[Range]) -> Floats:
        """Of runs of tokens, under masks without chunks."""
        return runs_costs(self.docs, self.number, runs, self.load)

    def before(self, places: Ints) -> Floats:
        """Of the tokens before each of some places, as if within a part they all cost the same."""
        start = self.docs.starts[self.number]
        ends = [0, *(part.stop - start for part in self.parts)]
        return np.interp(places, ends, [0.0, *accumulate(part.cost for part in self.parts)])


def _bends(branch: Branch, mask: Mask) -> set[int]:
    if mask.chunk is None:
        return bends_of(branch, mask)
    chunks = range(0, branch.last, mask.chunk)
    reach = -1 if mask.band.lo is None else -mask.band.lo
    found = {*chunks, branch.last, *(chunk + reach for chunk in chunks if 0 <= reach < mask.chunk)}
    return {bend for bend in found if bend <= branch.last}


def _in_chunk(rows: Rows, mask: Mask) -> Rows:
    """The same queries of a plain document as those of the chunk that holds them."""
    branch, first, last = rows
    if mask.chunk is None:
        return rows
    begin = first // mask.chunk * mask.chunk
    size = min(mask.chunk, branch.last - begin)
    own = Branch(branch.start + begin, branch.start + begin + size, 0, (PathRun(0, size, branch.start + begin),))
    return own, first - begin, last - begin
