"""The plan of a recurrence over a layout: pieces, which of them are of cut documents, and in which order they compose.

Pure integers, the same on every rank but for whose plan it is.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ringattn.kept import kept
from ringattn.kernels.spec import Range
from ringattn.parallel.layout import Layout
from ringattn.recurrent.rounds import Place, Round, plan_rounds


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
        firsts, middles, lasts: its other pieces, by where in their documents they are and then by local row.
        chains: for every document in several pieces, in order, who holds them: a rank, and the number of the piece
            among its cut ones, which are `firsts`, `middles` and `lasts` one after another.
        ahead: the rounds of the forward pass, in which states walk from the document's head.
        back: those of the backward pass, in which gradients of states walk from its end.
        communicates: whether a document is on several ranks; the same on all ranks, since a transfer is collective.
    """

    rank: int
    tokens: int
    whole: tuple[Piece, ...]
    firsts: tuple[Piece, ...]
    middles: tuple[Piece, ...]
    lasts: tuple[Piece, ...]
    chains: tuple[tuple[Place, ...], ...]
    ahead: tuple[Round, ...]
    back: tuple[Round, ...]
    communicates: bool

    @property
    def cut(self) -> tuple[Piece, ...]:
        return (*self.firsts, *self.middles, *self.lasts)

    def __str__(self) -> str:
        """Pieces, and what each of the cut ones waits for."""
        moved = (
            f"{len(self.ahead)} round{'s'[: len(self.ahead) != 1]} of transfers" if self.communicates else "no transfer"
        )
        lines = [
            f"rank {self.rank}: {self.tokens} tokens, {len(self.whole)} whole documents, {len(self.cut)} pieces of cut "
            f"ones; {moved}"
        ]
        for index, piece in enumerate(self.cut):
            chain = next(chain for chain in self.chains if (self.rank, index) in chain)
            before = chain[: chain.index((self.rank, index))]
            waits = " ∘ ".join(f"{rank}.{place}" for rank, place in before) or "the document's start"
            lines.append(
                f"  piece {self.rank}.{index}: document {piece.document} [{piece.first}, {piece.last}) in rows "
                f"[{piece.row}, {piece.row + piece.size}) after {waits}"
            )
        return "\n".join(lines)


def plan_recurrence(layout: Layout, rank: int | None = None, rounds: int = 1) -> RecurrencePlan:
    """The plan of a sequence rank (default: the layout's own). Kept with the layout.

    Arguments:
        rounds: in which states walk through cut documents; `ringattn.recurrent.price` says how many are quickest.

    Raises ValueError for fewer rounds than one.
    """
    if not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds must be an integer >= 1, got {rounds!r}")
    rank = layout.mesh.sequence_rank if rank is None else rank
    return kept(layout, ("recurrence", rank, rounds), lambda: _plan(layout, rank, rounds))


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


class Roles(NamedTuple):
    """A rank's pieces by where in their documents they are, each by local row."""

    whole: tuple[Piece, ...]
    firsts: tuple[Piece, ...]
    middles: tuple[Piece, ...]
    lasts: tuple[Piece, ...]

    @property
    def cut(self) -> tuple[Piece, ...]:
        return (*self.firsts, *self.middles, *self.lasts)


def roles_of(layout: Layout) -> tuple[Roles, ...]:
    """Of every rank. Kept with the layout."""

    def make() -> tuple[Roles, ...]:
        lengths = layout.docs.lengths
        ends: dict[tuple[bool, bool], int] = {(True, True): 0, (True, False): 1, (False, False): 2, (False, True): 3}
        out = []
        for held in pieces_of(layout):
            found: tuple[list[Piece], ...] = ([], [], [], [])
            for piece in held:
                found[ends[piece.first == 0, piece.last == lengths[piece.document]]].append(piece)
            out.append(Roles(*map(tuple, found)))
        return tuple(out)

    return kept(layout, "roles", make)


def chains_of(layout: Layout) -> tuple[tuple[Place, ...], ...]:
    """Who holds the pieces of each document in several pieces, in document order. Kept with the layout."""

    def make() -> tuple[tuple[Place, ...], ...]:
        places = {
            piece: (rank, number) for rank, one in enumerate(roles_of(layout)) for number, piece in enumerate(one.cut)
        }
        documents = by_document(pieces_of(layout)).values()
        return tuple(tuple(places[piece] for piece in parts) for parts in documents if len(parts) > 1)

    return kept(layout, "chains", make)


def _plan(layout: Layout, rank: int, rounds: int) -> RecurrencePlan:
    chains, ranks = chains_of(layout), layout.mesh.sequence_size
    return RecurrencePlan(
        rank,
        layout.tokens(rank),
        *roles_of(layout)[rank],
        chains=chains,
        ahead=plan_rounds(chains, rank, ranks, rounds),
        back=plan_rounds([chain[::-1] for chain in chains], rank, ranks, rounds),
        communicates=any(len({holder for holder, _ in chain}) > 1 for chain in chains),
    )
