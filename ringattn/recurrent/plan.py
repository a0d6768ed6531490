"""The plan of a recurrence over a layout: pieces, which of them are of cut documents, and in which order they compose.

Pure integers, the same on every rank but for whose plan it is.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ringattn.kept import kept
from ringattn.kernels.spec import Range
from ringattn.parallel.layout import Layout


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one document in consecutive rows of one rank.

    Arguments:
        document: its index.
        first, last: positions `[first, last)` in the document.
        rank, row: who holds it, and its first local row there.
    """

    document: int
    first: int
    last: int
    rank: int
    row: int

    @property
    def size(self) -> int:
        return self.last - self.first

    @property
    def rows(self) -> Range:
        return self.row, self.row + self.size


@dataclass(frozen=True)
class RecurrencePlan:
    """What one rank does in a recurrence.

    Arguments:
        rank: whose plan it is.
        tokens: local rows of the rank, padding included.
        whole: its pieces that are whole documents, by local row.
        cut: its pieces of documents that are in several pieces, by local row: those that it gives (M, U) of.
        slots: places for every rank's cut pieces in what is gathered: the most that one rank has.
        chains: for every cut document, in order, the gathered places of its pieces in document order; the i-th cut
            piece of rank r is at `r * slots + i`.
        communicates: whether a document is on several ranks; the same on all ranks, since a transfer is collective.
    """

    rank: int
    tokens: int
    whole: tuple[Piece, ...]
    cut: tuple[Piece, ...]
    slots: int
    chains: tuple[tuple[int, ...], ...]
    communicates: bool

    @cached_property
    def own(self) -> frozenset[int]:
        """Gathered places of the rank's own cut pieces."""
        return frozenset(range(self.rank * self.slots, self.rank * self.slots + len(self.cut)))

    @cached_property
    def ahead(self) -> tuple[tuple[int, ...], ...]:
        """The chains that this rank walks in the forward pass: as far as its own last piece."""
        return self._needed(self.chains)

    @cached_property
    def back(self) -> tuple[tuple[int, ...], ...]:
        """The chains that this rank walks in the backward pass: from the end to its own first piece."""
        return self._needed(tuple(chain[::-1] for chain in self.chains))

    def _needed(self, chains: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        ends = [max((index for index, place in enumerate(chain) if place in self.own), default=-1) for chain in chains]
        return tuple(chain[: end + 1] for chain, end in zip(chains, ends, strict=True) if end >= 0)

    def __str__(self) -> str:
        """Pieces, and what each of the cut ones waits for."""
        head = (
            f"rank {self.rank}: {self.tokens} tokens, {len(self.whole)} whole documents, {len(self.cut)} pieces of cut "
            f"ones; {'gathers ' + str(self.slots) + ' places a rank' if self.communicates else 'no transfer'}"
        )
        lines = [head]
        start = self.rank * self.slots
        for index, piece in enumerate(self.cut):
            chain = next(chain for chain in self.chains if start + index in chain)
            before = [divmod(place, self.slots) for place in chain[: chain.index(start + index)]]
            waits = " ∘ ".join(f"{rank}.{place}" for rank, place in before) or "the document's start"
            lines.append(
                f"  piece {self.rank}.{index}: document {piece.document} [{piece.first}, {piece.last}) in rows "
                f"[{piece.row}, {piece.row + piece.size}) after {waits}"
            )
        return "\n".join(lines)


def plan_recurrence(layout: Layout, rank: int | None = None) -> RecurrencePlan:
    """The plan of a sequence rank (default: the layout's own). Kept with the layout."""
    rank = layout.mesh.sequence_rank if rank is None else rank
    return kept(layout, ("recurrence", rank), lambda: _plan(pieces_of(layout), layout.tokens(rank), rank))


def check_layout(layout: Any) -> None:
    """Raises ValueError for what is no layout, NotImplementedError for one whose documents are trees."""
    if not isinstance(layout, Layout):
        raise ValueError(f"layout must be a Layout, got {type(layout).__name__}")
    if layout.docs.segments:
        raise NotImplementedError(
            f"layout holds trees ({layout.docs}), on which each branch would have to begin with what its parent ends "
            "with: that is not supported where something is carried from token to token. Give each path a document of "
            "its own"
        )


def pieces_of(layout: Layout) -> tuple[tuple[Piece, ...], ...]:
    """Every rank's pieces by local row. Kept with the layout."""

    def make() -> tuple[tuple[Piece, ...], ...]:
        spans = [
            (start, size, document)
            for document, (start, size) in enumerate(zip(layout.docs.starts, layout.docs.lengths, strict=True))
            if size
        ]
        return tuple(_pieces(layout.ranges(rank), spans, rank) for rank in range(layout.mesh.sequence_size))

    return kept(layout, "pieces", make)


def by_document(pieces: Sequence[Sequence[Piece]]) -> dict[int, list[Piece]]:
    """The pieces of each document that has any, in document order."""
    found: dict[int, list[Piece]] = defaultdict(list)
    for held in pieces:
        for piece in held:
            found[piece.document].append(piece)
    return {document: sorted(found[document], key=lambda piece: piece.first) for document in sorted(found)}


def _pieces(ranges: Sequence[Range], spans: list[tuple[int, int, int]], rank: int) -> tuple[Piece, ...]:
    """Local ranges of the stream cut where documents begin and end; neighbours that continue one another are one."""
    starts = [start for start, _, _ in spans]
    out: list[Piece] = []
    row = 0
    for begin, end in ranges:
        index = max(0, bisect_right(starts, begin) - 1)
        while index < len(spans) and starts[index] < end:
            start, size, document = spans[index]
            first, last = max(begin, start) - start, min(end, start + size) - start
            if first < last:
                piece = Piece(document, first, last, rank, row + start + first - begin)
                if out and (out[-1].document, out[-1].last, out[-1].rows[1]) == (document, first, piece.row):
                    piece = Piece(document, out[-1].first, last, rank, out.pop().row)
                out.append(piece)
            index += 1
        row += end - begin
    return tuple(out)


def _plan(pieces: tuple[tuple[Piece, ...], ...], tokens: int, rank: int) -> RecurrencePlan:
    documents = by_document(pieces)
    is_cut = {document: len(parts) > 1 for document, parts in documents.items()}
    cut = [tuple(piece for piece in held if is_cut[piece.document]) for held in pieces]
    slots = max(map(len, cut), default=0)
    places = {piece: holder * slots + index for holder, held in enumerate(cut) for index, piece in enumerate(held)}
    chains = tuple(tuple(places[piece] for piece in parts) for document, parts in documents.items() if is_cut[document])
    return RecurrencePlan(
        rank=rank,
        tokens=tokens,
        whole=tuple(piece for piece in pieces[rank] if not is_cut[piece.document]),
        cut=cut[rank],
        slots=slots,
        chains=chains,
        communicates=any(len({piece.rank for piece in parts}) > 1 for parts in documents.values()),
    )
