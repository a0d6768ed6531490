"""Who holds which pieces of which documents: what planners look up, for all ring positions at once."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ringattn.documents import Documents
from ringattn.kept import kept
from ringattn.kernels.spec import Range
from ringattn.mask import Band, Mask
from ringattn.parallel.geometry.block_table import Ints
from ringattn.parallel.geometry.blocks import Piece
from ringattn.parallel.placement.placement import Placement

TILE = 128  # inner rows are whole kernel tiles, counted from the piece's start


def inner_rows(first: int, last: int, length: int, band: Band) -> Range:
    """Queries of the piece `[first, last)` of a document that see no key outside of it.

    Whole tiles, but for an end that is the piece's own; `(last, last)` if there are none.
    """
    begin, end = first, last
    if first > 0:
        begin = last if band.lo is None else first + -(band.lo // TILE) * TILE
    if last < length and band.hi != 0:
        end = first if band.hi is None else first + (last - band.hi - first) // TILE * TILE
    return (begin, end) if begin < end else (last, last)


@dataclass(frozen=True)
class PieceTable:
    """Every position's pieces of the documents as attention sees them (chunks are documents).

    Columns of numbers, by position and row; planners look up the few pieces that they walk over.
    """

    docs: Documents
    position: Ints  # of each piece
    document: Ints
    first: Ints
    last: Ints
    row: Ints
    length: Ints  # of the piece's document
    rows: tuple[int, ...]  # of every position, padding included
    index: tuple[tuple[Range, ...], ...]  # of every position: the global ranges of its rows

    @classmethod
    def of(cls, placement: Placement, mask: Mask) -> "PieceTable":
        """Kept with the placement."""
        return kept(placement, ("pieces", mask.chunk), lambda: cls._of(placement, mask))

    @classmethod
    def _of(cls, placement: Placement, mask: Mask) -> "PieceTable":
        docs, placed = placement.docs.chunked(mask.chunk), placement.positions
        begin, end = _array(bound for ranges in placed for span in ranges for bound in span).reshape(-1, 2).T
        counts = np.array([len(ranges) for ranges in placed])
        position = np.repeat(np.arange(len(placed)), counts)
        before = np.cumsum(end - begin) - (end - begin)
        row = before - np.repeat(np.cumsum(placement.position_sizes) - placement.position_sizes, counts)
        number = np.flatnonzero(docs.lengths)
        start, length = _array(docs.starts)[number], _array(docs.lengths)[number]
        # Of every range the documents that begin before it ends and end after it begins.
        at, found = numbers_in(np.searchsorted(start + length, begin, "right"), np.searchsorted(start, end, "left"))
        first, last = np.maximum(begin[at], start[found]), np.minimum(end[at], start[found] + length[found])
        some = first < last
        at, found, first, last = at[some], found[some], first[some], last[some]
        return cls(
            docs,
            position[at],
            number[found],
            first - start[found],
            last - start[found],
            row[at] + first - begin[at],
            length[found],
            placement.position_sizes,
            placed,
        )

    def pieces(self, position: int) -> list[Piece]:
        """The pieces of a position, by row."""
        begin, end = np.searchsorted(self.position, (position, position + 1))
        return self._listed(slice(begin, end))

    def holders(self, document: int) -> list[tuple[int, Piece]]:
        """The `(position, piece)` of a document in ascending order: where each of its keys is."""
        if document not in self._holders:
            begin, end = np.searchsorted(self.document, (document, document + 1), sorter=self._by_document)
            at = self._by_document[begin:end]
            self._holders[document] = list(zip(self.position[at].tolist(), self._listed(at), strict=True))
        return self._holders[document]

    def own(self, position: int, document: int) -> list[Piece]:
        """The pieces of a document at a position, in ascending order."""
        return self._by_position(document).get(position, [])

    def readers(self, document: int) -> list[int]:
        """The positions that hold queries of a document."""
        return sorted(self._by_position(document))

    def cut_documents(self, position: int) -> list[int]:
        """The documents of a position that are also held elsewhere, in stream order: only they communicate."""
        return np.unique(self.document[self._cut & (self.position == position)]).tolist()

    @cached_property
    def _by_document(self) -> Ints:
        """Numbers of the pieces in the order of documents."""
        return np.lexsort((self.first, self.document))

    @cached_property
    def _cut(self) -> npt.NDArray[np.bool_]:
        """Pieces of documents that several positions hold."""
        document, position = self.document[self._by_document], self.position[self._by_document]
        changes = document[1:][(document[1:] == document[:-1]) & (position[1:] != position[:-1])]
        return np.isin(self.document, changes)

    @cached_property
    def _holders(self) -> dict[int, list[tuple[int, Piece]]]:
        """What `holders` found."""
        return {}

    @cached_property
    def _grouped(self) -> dict[int, dict[int, list[Piece]]]:
        """What `_by_position` found."""
        return {}

    def _by_position(self, document: int) -> dict[int, list[Piece]]:
        if document not in self._grouped:
            groups = self._grouped[document] = {}
            for position, piece in self.holders(document):
                groups.setdefault(position, []).append(piece)
        return self._grouped[document]

    def _listed(self, at: slice | Ints) -> list[Piece]:
        columns = (self.document, self.first, self.last, self.row)
        return [Piece(*values) for values in zip(*(column[at].tolist() for column in columns), strict=True)]

    def parted(self, piece: Piece, band: Band) -> list[Piece]:
        """A query piece cut where its inner rows, which see no key outside of it, begin and end.

        With a window these are most of it, and only its edges have to wait for keys from elsewhere.
        """
        length = self.docs.lengths[piece.document]
        begin, end = inner_rows(piece.first, piece.last, length, band)
        bounds = (piece.first, begin, end, piece.last)
        return [
            Piece(piece.document, first, last, piece.row + first - piece.first)
            for first, last in pairwise(bounds)
            if first < last
        ]

    def needs(self, piece: Piece, band: Band) -> Range:
        return band.keys_of(piece.first, piece.last, self.docs.lengths[piece.document])

    def local_run(self, position: int, piece: Piece, band: Band) -> Piece | None:
        """The piece of the same position that holds all keys of `piece`, if there is one."""
        first, last = self.needs(piece, band)
        if piece.first <= first and last <= piece.last:
            return piece  # of most: a whole document
        return next(
            (run for run in self.own(position, piece.document) if run.first <= first and last <= run.last), None
        )


def _array(values: Iterable[int]) -> Ints:
    return np.fromiter(values, dtype=np.int64)


def numbers_in(begin: Ints, end: Ints) -> tuple[Ints, Ints]:
    """All numbers of the ranges `[begin, end)`, and before them the index of each one's range."""
    counts = end - begin
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts - begin, counts)
