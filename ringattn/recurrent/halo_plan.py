"""The plan of a causal convolution over a layout: which rows before each piece a rank needs, and who has them.

Pure integers. A piece that does not open its document needs the `width - 1` tokens before it, or as many as there are.
Where pieces are shorter than that, they lie in several pieces, on several ranks.
"""

from dataclasses import dataclass
from typing import NamedTuple

from ringattn.kept import kept
from ringattn.parallel.layout import Layout
from ringattn.recurrent.plan import Piece, by_document, pieces_of


class HaloKey(NamedTuple):
    """By what a rank's plan is kept with its layout."""

    width: int
    rank: int


@dataclass(frozen=True)
class HaloPlan:
    """What one rank does for a convolution of a width.

    Arguments:
        width: of the convolution: its taps.
        pieces: the rank's pieces by local row.
        tokens: local rows, padding included.
        sends: for every rank the local rows that it needs of this one, in the order in which they are sent.
        receives: how many rows every rank sends here; they are laid end to end in the order of ranks.
        before: for every piece the `width - 1` rows before it, oldest first, as places among the received rows; -1
            where the document has not begun.
        communicates: whether rows move between ranks; the same on all ranks.
    """

    width: int
    pieces: tuple[Piece, ...]
    tokens: int
    sends: tuple[tuple[int, ...], ...]
    receives: tuple[int, ...]
    before: tuple[tuple[int, ...], ...]
    communicates: bool

    def __str__(self) -> str:
        moved = ", ".join(f"{len(rows)} to rank {rank}" for rank, rows in enumerate(self.sends) if rows)
        return f"convolution of width {self.width}: {len(self.pieces)} pieces; sends {moved or 'nothing'}"


def plan_halo(layout: Layout, width: int, rank: int | None = None) -> HaloPlan:
    """The plan of a sequence rank (default: the layout's own). Kept with the layout.

    Raises ValueError for a width below 1.
    """
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"width must be an integer >= 1, got {width!r}")
    rank = layout.mesh.sequence_rank if rank is None else rank
    return kept(layout, HaloKey(width, rank), lambda: _plans(layout, width)[rank])


def _plans(layout: Layout, width: int) -> tuple[HaloPlan, ...]:
    """Every rank's plan, made together and kept: what one receives is what another sends."""
    return kept(layout, ("halos", width), lambda: _make(layout, width))


def _make(layout: Layout, width: int) -> tuple[HaloPlan, ...]:
    ranks = layout.mesh.sequence_size
    pieces = pieces_of(layout)
    documents = by_document(pieces)
    # wanted[holder][taker]: (row of the holder, piece of the taker, tap), in the order in which rows travel
    wanted: list[list[list[tuple[int, int, int]]]] = [[[] for _ in range(ranks)] for _ in range(ranks)]
    for taker, held in enumerate(pieces):
        for number, piece in enumerate(held):
            for holder, row, tap in _rows_before(piece, documents[piece.document], width):
                wanted[holder][taker].append((row, number, tap))
    communicates = any(wanted[a][b] for a in range(ranks) for b in range(ranks) if a != b)
    return tuple(
        HaloPlan(
            width=width,
            pieces=pieces[rank],
            tokens=layout.tokens(rank),
            sends=tuple(tuple(row for row, _, _ in wanted[rank][taker]) for taker in range(ranks)),
            receives=tuple(len(wanted[holder][rank]) for holder in range(ranks)),
            before=_before([wanted[holder][rank] for holder in range(ranks)], len(pieces[rank]), width),
            communicates=communicates,
        )
        for rank in range(ranks)
    )


def _rows_before(piece: Piece, parts: list[Piece], width: int) -> list[tuple[int, int, int]]:
    """(rank, its local row, tap 0 .. width - 2) of the tokens before a piece; its document's pieces are in order."""
    found = []
    start = piece.first - (width - 1)
    for other in reversed(parts[: parts.index(piece)]):
        if other.last <= start:
            break
        for position in range(max(other.first, start), other.last):
            found.append((other.rank, other.row + position - other.first, position - start))
    return found


def _before(arriving: list[list[tuple[int, int, int]]], pieces: int, width: int) -> tuple[tuple[int, ...], ...]:
    places = [[-1] * (width - 1) for _ in range(pieces)]
    for place, (_, number, tap) in enumerate(one for rows in arriving for one in rows):
        places[number][tap] = place
    return tuple(map(tuple, places))
