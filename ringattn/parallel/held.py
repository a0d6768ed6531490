"""Who holds which pieces of which documents: what planners look up, for all ring positions at once."""

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from ringattn.documents import Documents
from ringattn.kernels.spec import Range
from ringattn.mask import Band, Mask
from ringattn.parallel.blocks import Piece
from ringattn.parallel.layout import Layout

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
class Held:
    """Every position's pieces of the documents as attention sees them (chunks are documents)."""

    docs: Documents
    positions: tuple[tuple[Piece, ...], ...]
    rows: tuple[int, ...]  # of every position, padding included
    index: tuple[tuple[Range, ...], ...]  # of every position: the global ranges of its rows

    @classmethod
    def of(cls, layout: Layout, mask: Mask) -> "Held":
        docs = layout.docs.chunked(mask.chunk)
        spans = [(start, index) for index, start in enumerate(docs.starts) if docs.lengths[index]]
        starts = [start for start, _ in spans]
        positions = []
        for ranges in layout.positions:
            pieces, row = [], 0
            for begin, end in ranges:
                # The document before the first start at or after `begin` may reach into the range.
                number = max(0, bisect_left(starts, begin) - 1)
                while number < len(spans) and spans[number][0] < end:
                    start, index = spans[number]
                    first, last = max(begin, start), min(end, start + docs.lengths[index])
                    if first < last:
                        pieces.append(Piece(index, first - start, last - start, row + first - begin))
                    number += 1
                row += end - begin
            positions.append(tuple(pieces))
        return cls(docs, tuple(positions), layout.position_sizes, layout.positions)

    @cached_property
    def by_document(self) -> dict[int, list[tuple[int, Piece]]]:
        """For each document its `(position, piece)` in ascending order: where each of its keys is."""
        holders: dict[int, list[tuple[int, Piece]]] = defaultdict(list)
        for position, pieces in enumerate(self.positions):
            for piece in pieces:
                holders[piece.document].append((position, piece))
        for pairs in holders.values():
            pairs.sort(key=lambda pair: pair[1].first)
        return holders

    @cached_property
    def _own(self) -> dict[tuple[int, int], list[Piece]]:
        own: dict[tuple[int, int], list[Piece]] = defaultdict(list)
        for document, pairs in self.by_document.items():
            for position, piece in pairs:
                own[position, document].append(piece)
        return own

    def own(self, position: int, document: int) -> list[Piece]:
        """The pieces of a document at a position, in ascending order."""
        return self._own.get((position, document), [])

    @cached_property
    def readers(self) -> dict[int, list[int]]:
        """The positions that hold queries of each document."""
        return {document: sorted({position for position, _ in pairs}) for document, pairs in self.by_document.items()}

    @cached_property
    def cut_documents(self) -> list[list[int]]:
        """For each position its documents that are also held elsewhere, in stream order: only they communicate."""
        out: list[list[int]] = [[] for _ in self.positions]
        for document, readers in sorted(self.readers.items()):
            if len(readers) > 1:
                for position in readers:
                    out[position].append(document)
        return out

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
        return next(
            (run for run in self.own(position, piece.document) if run.first <= first and last <= run.last), None
        )
