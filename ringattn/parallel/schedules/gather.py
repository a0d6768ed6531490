"""The stages of a ring position that gathers all keys it needs and computes each query once over them. Pure integers.

A *gather* computes pieces that see only keys of the position itself while the others' keys are on their way; *joint*
means that all pieces wait and are computed together: for packs so short that another call takes longer than what it
would hide.

Each piece that waits has its keys in a run of the buffer of its own, so that a call may compute all whose bands are
alike, and writes every gradient once: what two pieces of a document see stands there twice. Where that would be many
rows the pieces of a document share them and are in a call each, which takes less time then than copies of the rows and
of their gradients.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ringattn.kernels.spec import Block, Range
from ringattn.mask import Band
from ringattn.parallel.geometry.blocks import Piece, blocks_of, group_calls, join_full, shared_rows
from ringattn.parallel.geometry.ranges import length, overlap, union
from ringattn.parallel.placement.pieces import PieceTable
from ringattn.parallel.plan.plan import AttentionPlan, Stage
from ringattn.parallel.schedules.demand import KeyDemand
from ringattn.parallel.schedules.schedule import Schedule
from ringattn.parallel.schedules.segment_demand import SegmentDemand
from ringattn.parallel.schedules.segments import plan_gathered
from ringattn.parallel.schedules.stage_builder import StageBuilder
from ringattn.parallel.schedules.stage_work import AllPositions, Passes

Waiting = Callable[[int, int], list[Piece]]  # of a position and a document: its pieces that wait, ascending


@dataclass(frozen=True)
class Gather(Schedule):
    """Pieces that see only keys of their position, and then the others over all their keys at once."""

    kind: ClassVar[str] = "gather"
    segments: ClassVar[bool] = True

    def plan(self, demand: KeyDemand | SegmentDemand, position: int) -> AttentionPlan:
        if isinstance(demand, SegmentDemand):
            return plan_gathered(self.kind, demand, position, joined=False)
        held, band = demand.pieces, demand.band

        def waiting(reader: int, document: int) -> list[Piece]:
            parts = [part for piece in held.own(reader, document) for part in held.parted(piece, band)]
            return [part for part in parts if held.local_run(reader, part, band) is None]

        local = _local_blocks(held, position, band)
        return _plan(self.kind, demand.parted, position, local, held.cut_documents(position), waiting)

    def passes(self, every: AllPositions) -> Passes:
        if isinstance(every.demand, SegmentDemand):
            return Schedule.passes(self, every)
        demand = every.counted.parted
        by_call = every.call_seconds(demand.gathered_blocks, demand.gathered_ordinal, demand.position)
        forward, backward = (np.stack([calls[0], calls[1:].sum(0)]) for calls in by_call)
        return every.passes(
            every.moved([range(1, demand.positions)]),
            (forward, backward),
            demand.gathered_calls,
            copied=np.stack([np.zeros_like(demand.copied_rows), demand.copied_rows]),
            shared_k=demand.summed_rows,
        )


@dataclass(frozen=True)
class Joint(Gather):
    """All pieces wait, and are computed together."""

    kind: ClassVar[str] = "joint"

    def suits(self, band: Band) -> bool:
        """With a window to the right it is not one call, but one for every place where a document is cut."""
        return band.hi in (0, None)

    def plan(self, demand: KeyDemand | SegmentDemand, position: int) -> AttentionPlan:
        if isinstance(demand, SegmentDemand):
            return plan_gathered(self.kind, demand, position, joined=True)
        held = demand.pieces
        documents = list(dict.fromkeys(piece.document for piece in held.pieces(position)))
        return _plan(self.kind, demand.joint, position, [], documents, held.own)

    def passes(self, every: AllPositions) -> Passes:
        return Schedule.passes(self, every) if isinstance(every.demand, SegmentDemand) else super().passes(every.joint)


def _local_blocks(held: PieceTable, position: int, band: Band) -> list[Block]:
    """The blocks of pieces that see only keys of the position."""
    blocks = []
    for piece in held.pieces(position):
        for part in held.parted(piece, band):
            run = held.local_run(position, part, band)
            blocks += blocks_of(part, [] if run is None else [run], band)
    return join_full(blocks)


def _plan(
    kind: str,
    demand: KeyDemand,
    position: int,
    local: list[Block],
    documents: list[int],
    waiting: Waiting,
) -> AttentionPlan:
    """A local stage with these blocks, and one stage for all pieces that wait.

    Arguments:
        demand: of the pieces that wait.
        documents: of the position, those that may have some.
    """
    held, cast = demand.pieces, StageBuilder()
    queries = [piece for document in documents for piece in waiting(position, document)]
    wanted = [held.needs(query, demand.band) for query in queries]
    runs = _shared_runs if _repeated(queries, wanted) > demand.most_repeated else _own_runs
    for query, run in zip(queries, runs(_Keys(cast, held, position), queries, wanted), strict=True):
        cast.blocks += blocks_of(query, run, demand.band)
    cast.blocks = join_full(cast.blocks)
    for document in held.cut_documents(position):
        for reader in held.readers(document):
            if reader != position:
                for keys in union(held.needs(piece, demand.band) for piece in waiting(reader, document)):
                    cast.leave(reader, keys, held.own(position, document))
    routes = demand.routes(position, range(1, len(held.rows)))
    shared_q = shared_rows([block.q for block in (*local, *cast.blocks)])
    return AttentionPlan(
        schedule=kind,
        ring=len(held.rows),
        ring_rank=position,
        rows=held.rows[position],
        index=held.index[position],
        stages=(Stage(group_calls(local, shared_q)), cast.stage(shared_q, *routes)),
        shared_q=shared_q,
        shared_k=shared_rows([block.k for block in local], cast.returned),
    )


def _repeated(queries: list[Piece], wanted: list[Range]) -> int:
    """Rows that would stand in a buffer more than once if every piece had its own."""
    runs: dict[int, list[Range]] = defaultdict(list)
    for number, (query, keys) in enumerate(zip(queries, wanted, strict=True)):
        if not number or not _continues(queries[number - 1], wanted[number - 1], query, keys):
            runs[query.document].append(keys)
    return sum(length(spans) - length(union(spans)) for spans in runs.values())


def _continues(last: Piece, last_wanted: Range, query: Piece, wanted: Range) -> bool:
    """Whether a piece continues the one before it and sees the same keys."""
    return (last.document, last.last, last_wanted) == (query.document, query.first, wanted)


def _own_runs(keys: "_Keys", queries: list[Piece], wanted: list[Range]) -> list[list[Piece]]:
    """The keys of each query in rows of its own, laid out in the order of the queries' rows: a kernel call takes its
    keys in the order of its queries."""
    runs: dict[Piece, list[Piece]] = {}
    last: tuple[Piece, Range] | None = None
    for query, span in sorted(zip(queries, wanted, strict=True), key=lambda pair: pair[0].row):
        again = last is not None and _continues(*last, query, span)
        runs[query] = runs[last[0]] if again and last is not None else keys.placed(query.document, span)
        last = query, span
    return [runs[query] for query in queries]


def _shared_runs(keys: "_Keys", queries: list[Piece], wanted: list[Range]) -> list[list[Piece]]:
    """The keys of each query, which it shares with the other pieces of its document: all that any of them wants.
    Queries are in the order of documents, and so are the rows."""
    spans: dict[int, list[Range]] = defaultdict(list)
    for query, span in zip(queries, wanted, strict=True):
        spans[query.document].append(span)
    runs = {
        document: [piece for span in union(own) for piece in keys.placed(document, span)]
        for document, own in spans.items()
    }
    return [runs[query.document] for query in queries]


class _Keys:
    """The buffer of a position under construction."""

    def __init__(self, cast: StageBuilder, held: PieceTable, position: int) -> None:
        self._cast, self._held, self._position = cast, held, position
        self._arrived: dict[int, list[Piece]] = defaultdict(list)  # by document, at their rows, each once

    def placed(self, document: int, wanted: Range) -> list[Piece]:
        """New rows, one after another, with the keys at these positions of a document. From one time to the next
        neither bound may fall."""
        pieces: list[Piece] = []
        for holder, piece in self._held.holders(document):
            first, last = overlap(wanted, (piece.first, piece.last))
            if first >= last:
                continue
            if holder == self._position:
                placed = self._room(document, first, last)
                local = piece.row + first - piece.first
                self._cast.copy((local, local + last - first), (placed.row, placed.stop_row))
                pieces.append(placed)
            else:
                pieces += self._moved(holder, document, first, last)
        return pieces

    def _room(self, document: int, first: int, last: int) -> Piece:
        start = self._held.docs.starts[document]
        row, _ = self._cast.room((start + first, start + last))
        return Piece(document, first, last, row)

    def _moved(self, holder: int, document: int, begin: int, end: int) -> list[Piece]:
        """Rows of another position: those that are in the buffer already stand there once more."""
        placed = []
        for there in self._arrived[document]:
            first, last = overlap((begin, end), (there.first, there.last))
            if first < last:
                again = self._room(document, first, last)
                source = there.row + first - there.first
                self._cast.repeats.append(((source, source + last - first), (again.row, again.stop_row)))
                placed.append(again)
                begin = last
        if begin < end:
            new = self._room(document, begin, end)
            self._cast.arrive(holder, document, (new.row, new.stop_row))
            self._arrived[document].append(new)
            placed.append(new)
        return placed
