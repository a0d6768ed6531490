"""What all ring positions need of one another, counted at once: columns of numbers instead of a plan per position."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ringattn.mask import Band
from ringattn.parallel.geometry.block_table import BlockTable, Ints, needs
from ringattn.parallel.placement.pieces import PieceTable, inner_rows, numbers_in
from ringattn.parallel.plan.route import Route

# Rows that a gather's buffer has more than once at most, so that the pieces of a document are one call: so many take,
# with their gradients, some 90 µs of a GPU, as long as what a call more loses.
REPEATED = 8192


class RowTraffic(ABC):
    """The key rows that positions need of one another, however their queries see them.

    Arguments:
        positions: how many there are.
        rows: of each position.
    """

    positions: int
    rows: Ints
    band: Band

    @property
    @abstractmethod
    def traffic(self) -> tuple[Ints, Ints, Ints]:
        """Reader, holder, and key rows that the reader needs of the holder (of itself, those to copy)."""

    def routes(self, position: int, distances: range) -> tuple[Route, Route]:
        """The cast of the rows that come from so far away on the ring, as a position sees it, and the way back."""
        reader, holder, rows = self.traffic
        far = (holder - reader) % self.positions
        some = (far > 0) & (far >= distances.start) & (far < distances.stop)
        some &= (far - distances.start) % distances.step == 0
        reader, holder, rows = reader[some], holder[some], rows[some]
        cast = _route(holder, reader, rows, position, self.positions)
        return cast, _route(reader, holder, rows, position, self.positions)

    @cached_property
    def received_rows(self) -> Ints:
        reader, holder, rows = self.traffic
        return sum_by(reader, rows * (reader != holder), self.positions)


@dataclass(frozen=True)
class KeyDemand(RowTraffic):
    """Every position's pieces as columns, and the key rows that positions need of one another.

    The columns are sorted by document, position and place in the document; `pieces` is what they were made of.
    """

    pieces: PieceTable
    positions: int
    position: Ints  # of each piece
    document: Ints
    first: Ints
    last: Ints
    length: Ints  # of the piece's document
    rows: Ints  # of each position
    band: Band
    held_first: Ints | None = None  # of parts of pieces: the piece's own range
    held_last: Ints | None = None
    joined: bool = False  # pieces that need no key from elsewhere are computed with the others, from one buffer

    @classmethod
    def of(cls, pieces: PieceTable, band: Band) -> "KeyDemand":
        order = np.lexsort((pieces.first, pieces.position, pieces.document))
        columns = (pieces.position, pieces.document, pieces.first, pieces.last, pieces.length)
        position, document, first, last, length = (column[order] for column in columns)
        rows = np.array(pieces.rows, dtype=np.int64)
        return cls(pieces, len(pieces.rows), position, document, first, last, length, rows, band)

    @cached_property
    def needs(self) -> tuple[Ints, Ints]:
        """The keys that the queries of each piece see."""
        return needs(self.first, self.last, self.length, self.band)

    @cached_property
    def parted(self) -> "KeyDemand":
        """This demand with query pieces cut as `PieceTable.parted` cuts them."""
        if self.joined or (self.band.lo is None and self.band.hi in (0, None)):
            return self  # a piece sees all of its document's start, or nothing outside
        columns = self.first.tolist(), self.last.tolist(), self.length.tolist()
        bounds = [inner_rows(first, last, length, self.band) for first, last, length in zip(*columns, strict=True)]
        inner = np.array(bounds, dtype=np.int64).reshape(-1, 2)
        edges = np.stack([self.first, inner[:, 0], inner[:, 1], self.last])
        piece = np.tile(np.arange(len(self.first)), 3)
        first, last = edges[:-1].ravel(), edges[1:].ravel()
        some = first < last
        order = np.flatnonzero(some)[np.lexsort((first[some], piece[some]))]
        at = piece[order]
        return replace(
            self,
            position=self.position[at],
            document=self.document[at],
            first=first[order],
            last=last[order],
            length=self.length[at],
            held_first=self.first[at],
            held_last=self.last[at],
        )

    @cached_property
    def joint(self) -> "KeyDemand":
        """This demand where every piece waits for the keys from elsewhere."""
        return replace(self, joined=True)

    @cached_property
    def local(self) -> npt.NDArray[np.bool_]:
        """Pieces that are computed from local rows, since they need no key from elsewhere."""
        if self.joined:
            return np.zeros(len(self.first), dtype=np.bool_)
        first = self.first if self.held_first is None else self.held_first
        last = self.last if self.held_last is None else self.held_last
        return (self.needs[0] >= first) & (self.needs[1] <= last)

    @cached_property
    def outer_rows(self) -> Ints:
        """Queries of each piece that see keys outside of it: with a window those at its edges, else all or none."""
        rows, sides = self.last - self.first, ((self.band.lo, self.first > 0), (self.band.hi, self.last < self.length))
        edges = [(rows if side is None else np.minimum(abs(side), rows)) * more for side, more in sides]
        return np.minimum(edges[0] + edges[1], rows)

    @cached_property
    def group(self) -> Ints:
        """Pieces of one document at one position share a number; ascending."""
        return self.document * self.positions + self.position

    @cached_property
    def ordinal(self) -> Ints:
        """Number of a piece among the pieces of its group."""
        starts = np.searchsorted(self.group, self.group, side="left")
        return np.arange(len(self.group)) - starts

    @cached_property
    def _cut(self) -> npt.NDArray[np.bool_]:
        """Pieces of documents of which some need keys from elsewhere."""
        cut = np.zeros(self.document.max(initial=0) + 1, dtype=np.bool_)  # by document
        cut[self.document[~self.local]] = True
        return cut[self.document]

    @cached_property
    def cut_rows(self) -> Ints:
        """Rows of each position in documents that it needs keys for or that others read: of those that are cut."""
        return sum_by(self.position, (self.last - self.first) * self._cut, self.positions)

    @cached_property
    def summed_rows(self) -> Ints:
        """Those of `cut_rows` whose keys may have gradients from local calls and from others, at positions that gather:
        all of them where a piece of a document that is cut is local."""
        both = sum_by(self.position, (self.local & self._cut).astype(np.int64), self.positions)
        return self.cut_rows * (both > 0)

    @property
    def most_repeated(self) -> float:
        """Rows that may stand more than once in the buffer of a position: else its pieces share what they want."""
        return float("inf") if self.joined else REPEATED

    @cached_property
    def _wanted(self) -> tuple[Ints, Ints, Ints]:
        """The pieces that wait, where what they want begins that none of their group before them wants, and of what
        those want too the rows that stand in a buffer once more."""
        want = np.flatnonzero(~self.local)
        group, begin, end = self.group[want], self.needs[0][want], self.needs[1][want]
        new, _ = _union(group, begin, end)
        again = np.minimum(new, end) - begin
        # A piece that continues the one before and wants the same is computed with it.
        same = (group[1:] == group[:-1]) & (begin[1:] == begin[:-1]) & (end[1:] == end[:-1])
        again[1:][same & (self.first[want][1:] == self.last[want][:-1])] = 0
        repeated = sum_by(self.position[want], again, self.positions)
        return want, new, np.where(repeated[self.position[want]] > self.most_repeated, 0, again)

    @cached_property
    def traffic(self) -> tuple[Ints, Ints, Ints]:
        """Reader, holder, and key rows that the reader needs of the holder (of itself, those to copy)."""
        want, lo, _ = self._wanted
        hi = self.needs[1][want]
        begin, end = (np.searchsorted(self.document, self.document[want], side) for side in ("left", "right"))
        index, piece = numbers_in(begin, end)
        rows = np.minimum(hi[index], self.last[piece]) - np.maximum(lo[index], self.first[piece])
        some = rows > 0
        pair = self.position[want][index[some]] * self.positions + self.position[piece[some]]
        total = sum_by(pair, rows[some], self.positions**2)
        pairs = np.flatnonzero(total)
        return pairs // self.positions, pairs % self.positions, total[pairs]

    @cached_property
    def copied_rows(self) -> Ints:
        """Rows of each position's buffer, if it gathers, beside those that arrive: copies of its own keys, and keys
        that stand there once more."""
        reader, holder, rows = self.traffic
        want, _, again = self._wanted
        copies = sum_by(reader, rows * (reader == holder), self.positions)
        return copies + sum_by(self.position[want], again, self.positions)

    @cached_property
    def gathered_ordinal(self) -> Ints:
        """Number of the call of a piece at a position that gathers: local ones are in the first. Those that wait are in
        the second; where they share keys each of a document is in another, and so is each edge of a window, whose
        neighbours are local."""
        ordinal = np.zeros(len(self.first), dtype=np.int64)
        want, new, again = self._wanted
        position, group = self.position[want], self.group[want]
        number = np.arange(len(want))
        if self.held_first is not None:
            by_position = np.argsort(position, kind="stable")
            counted = number - np.searchsorted(position[by_position], position[by_position])
            ordinal[want[by_position]] = 1 + counted
            return ordinal
        shared = sum_by(position, ((new > self.needs[0][want]) & (again == 0)).astype(np.int64), self.positions) > 0
        ordinal[want] = 1 + (number - np.searchsorted(group, group)) * shared[position]
        return ordinal

    @cached_property
    def gathered_calls(self) -> Ints:
        """Kernel calls of each position that gathers, in its local stage and in the later one: (2, positions)."""
        calls = np.zeros((2 + int(self.gathered_ordinal.max(initial=0)), self.positions), dtype=np.int64)
        calls[self.gathered_ordinal, self.position] = 1
        return np.stack([calls[0], calls[1:].sum(0)])

    @cached_property
    def gathered_blocks(self) -> BlockTable:
        """Each piece over all its keys, as one block."""
        return BlockTable.cut(self.first, self.last, *self.needs, self.band)

    @cached_property
    def own_blocks(self) -> tuple[BlockTable, Ints, Ints]:
        """Each piece over the keys of its own group, with the numbers of the query piece and of the key piece."""
        begin, end = (np.searchsorted(self.group, self.group, side) for side in ("left", "right"))
        query, run = numbers_in(begin, end)
        first = np.maximum(self.first[run], self.needs[0][query])
        last = np.minimum(self.last[run], self.needs[1][query])
        some = first < last
        query, run = query[some], run[some]
        return BlockTable.cut(self.first[query], self.last[query], first[some], last[some], self.band), query, run


def sum_by(key: Ints, values: npt.NDArray, size: int) -> npt.NDArray:
    """Sum of the values of each key in `[0, size)`; integers stay integers (exact up to 2^53)."""
    return np.bincount(key, values, size).astype(values.dtype)


def _route(sender: Ints, receiver: Ints, rows: Ints, rank: int, ranks: int) -> Route:
    """One rank's view of messages that are given as columns."""
    mine, arriving, before = sender == rank, receiver == rank, receiver < rank
    return Route(
        sends=tuple(sum_by(receiver[mine], rows[mine], ranks).tolist()),
        receives=tuple(sum_by(sender[arriving], rows[arriving], ranks).tolist()),
        there=tuple(sum_by(sender[before], rows[before], ranks).tolist()),
        most=int(sum_by(sender, rows, ranks).max(initial=0)),
    )


def _union(group: Ints, lo: Ints, hi: Ints) -> tuple[Ints, Ints]:
    """Ranges sorted by group and start, each without what ranges of its group before it cover; some become empty."""
    base = group * (int(hi.max(initial=0)) + 1)
    covered = np.maximum.accumulate(hi + base)
    before = np.concatenate([[-1], covered[:-1]]) if len(covered) else covered
    return np.maximum(lo, before - base), hi
