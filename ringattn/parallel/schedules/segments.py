"""The stages of a ring position where documents have segments, for all schedules. Pure integers.

What `gather.py` and `ring.py` do with pieces of documents is done here with groups of queries (`segment_demand.py`),
whose keys are runs of a path. Where they stand in a row, as in a buffer that was laid out for the group, a query is in
one call; where branches share the keys of what is before them, in two, merged by the lse.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ringattn.kept import kept
from ringattn.kernels.spec import Block, Range
from ringattn.parallel.geometry.blocks import Piece, group_calls, join_full, shared_rows
from ringattn.parallel.geometry.ranges import length, union
from ringattn.parallel.plan.plan import AttentionPlan, Stage
from ringattn.parallel.schedules import demand as limits
from ringattn.parallel.schedules.segment_demand import Group, Rows, SegmentDemand
from ringattn.parallel.schedules.stage_builder import StageBuilder


def plan_gathered(kind: str, demand: SegmentDemand, position: int, joined: bool) -> AttentionPlan:
    """A local stage for groups that see only keys of the position, and one for all others.

    Every group has its keys in a row where few rows are in the buffer once more for that; joined groups, where these
    are no more than the position's own.

    Arguments:
        joined: all groups are computed in the later stage.
    """
    return kept(demand, (kind, position), lambda: _gathered(kind, demand, position, joined))


def _gathered(kind: str, demand: SegmentDemand, position: int, joined: bool) -> AttentionPlan:
    most_repeated = max(limits.REPEATED, int(demand.rows[position]) if joined else 0)
    groups = demand.groups(position)
    waiting = [group for group in groups if joined or not demand.is_local(position, group)]
    away = {id(group) for group in waiting}
    here = [(group, demand.held[position]) for group in groups if id(group) not in away]
    buffer = _Buffer(demand, position)
    wanted = [span for group in waiting for span in group.tokens]
    if length(wanted) - length(union(wanted)) <= most_repeated:
        later = [(group, buffer.add(group.tokens)) for group in sorted(waiting, key=lambda group: group.row)]
    else:
        together = buffer.add(union(wanted))
        later = [(group, together) for group in waiting]
    cast = buffer.cast
    cast.blocks = _blocks(later)
    for reader in range(demand.positions):
        _leave(cast, demand, position, reader)
    return _plan(kind, demand, position, _blocks(here), [(cast, range(1, demand.positions))])


def plan_staged(kind: str, demand: SegmentDemand, position: int, distances: Sequence[range]) -> AttentionPlan:
    """A local stage over the position's own keys, and later ones over those that come from so far away on the ring."""
    return kept(demand, (kind, position, *distances), lambda: _staged(kind, demand, position, distances))


def _staged(kind: str, demand: SegmentDemand, position: int, distances: Sequence[range]) -> AttentionPlan:
    casts = [StageBuilder() for _ in distances]
    stage_of = {distance: number for number, span in enumerate(distances) for distance in span}
    pieces: list[list[Piece]] = [[] for _ in distances]
    for piece in demand.held_by(demand.needs[position]):
        if piece.document != position:
            number = stage_of[(piece.document - position) % demand.positions]
            target = casts[number].room((piece.first, piece.last))
            casts[number].arrive(piece.document, piece.first, target)
            pieces[number].append(Piece(0, piece.first, piece.last, target[0]))
    groups = demand.groups(position)
    for cast, rows in zip(casts, pieces, strict=True):
        there = Rows(tuple(rows))
        cast.blocks = _blocks([(group, there) for group in groups])
    for reader in range(demand.positions):
        if reader != position:
            _leave(casts[stage_of[(position - reader) % demand.positions]], demand, position, reader)
    local = _blocks([(group, demand.held[position]) for group in groups])
    return _plan(kind, demand, position, local, list(zip(casts, distances, strict=True)))


def _blocks(groups: Sequence[tuple[Group, Rows]]) -> list[Block]:
    """The blocks of groups over those of their keys that stand in some rows."""
    blocks = []
    for group, rows in groups:
        for view in group.views:
            blocks += view.blocks(rows.on_path(group.branch, group.number, view.keys))
    return join_full(blocks)


def _leave(cast: StageBuilder, demand: SegmentDemand, position: int, reader: int) -> None:
    """What a reader needs of this position, in the order of the stream, which is that of the reader's messages."""
    for piece in demand.messages.get((position, reader), ()):
        own = Piece(piece.first, piece.first, piece.last, piece.row)
        cast.leave(reader, (piece.first, piece.last), [own])


def _plan(
    kind: str,
    demand: SegmentDemand,
    position: int,
    local: list[Block],
    casts: Sequence[tuple[StageBuilder, range]],
) -> AttentionPlan:
    shared_q = shared_rows([block.q for blocks in (local, *(cast.blocks for cast, _ in casts)) for block in blocks])
    later = [cast.stage(shared_q, *demand.routes(position, distances)) for cast, distances in casts]
    return AttentionPlan(
        schedule=kind,
        ring=demand.positions,
        ring_rank=position,
        rows=int(demand.rows[position]),
        index=demand.index[position],
        stages=(Stage(group_calls(local, shared_q)), *later),
        shared_q=shared_q,
        shared_k=shared_rows([block.k for block in local], [rows for cast, _ in casts for rows in cast.returned]),
    )


@dataclass
class _Buffer:
    """The buffer of a position that gathers, under construction."""

    demand: SegmentDemand
    position: int
    cast: StageBuilder = field(default_factory=StageBuilder)
    _arrived: list[Piece] = field(default_factory=list)  # rows of others, each once

    def add(self, spans: Sequence[Range]) -> Rows:
        """New rows, one after another, with these tokens."""
        placed: list[Piece] = []
        for piece in self.demand.held_by(spans):
            if piece.document == self.position:
                target = self.cast.room((piece.first, piece.last))
                self.cast.copy((piece.row, piece.row + piece.last - piece.first), target)
                placed.append(Piece(0, piece.first, piece.last, target[0]))
            else:
                placed += self._moved(piece)
        return Rows(tuple(sorted(placed)))

    def _moved(self, piece: Piece) -> list[Piece]:
        """Rows of another position: those that are in the buffer already stand there once more."""
        placed, new = [], []
        begin = piece.first
        for there in [*Rows(tuple(self._arrived)).inside(piece.first, piece.last), None]:
            end = piece.last if there is None else there.first
            if begin < end:
                target = self.cast.room((begin, end))
                self.cast.arrive(piece.document, begin, target)
                new.append(Piece(0, begin, end, target[0]))
            if there is not None:
                target = self.cast.room((there.first, there.last))
                self.cast.repeats.append(((there.row, there.row + there.last - there.first), target))
                placed.append(Piece(0, there.first, there.last, target[0]))
                begin = there.last
        self._arrived = sorted([*self._arrived, *new])
        return placed + new
