"""The stages of a ring position that computes what it can from its own keys while those of some ranks are on their way,
then from these while others' are: each query once per stage. Pure integers."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from ringattn.kept import kept
from ringattn.kernels.spec import Block, Range
from ringattn.mask import Band
from ringattn.parallel.geometry.block_table import BlockTable, Floats, Ints
from ringattn.parallel.geometry.blocks import Piece, blocks_of, group_calls, join_full, shared_rows
from ringattn.parallel.geometry.ranges import overlap, union
from ringattn.parallel.placement.pieces import PieceTable
from ringattn.parallel.plan.plan import AttentionPlan, Stage
from ringattn.parallel.schedules.demand import KeyDemand, sum_by
from ringattn.parallel.schedules.schedule import Schedule
from ringattn.parallel.schedules.segment_demand import SegmentDemand
from ringattn.parallel.schedules.segments import plan_staged
from ringattn.parallel.schedules.stage_builder import StageBuilder
from ringattn.parallel.schedules.stage_work import AllPositions, Passes

RING_STAGES = 4  # of a ring that was asked for without a number


@dataclass(frozen=True)
class Ring(Schedule):
    """A ring of `stages`, the local one included; of a short ring there are fewer."""

    stages: int = RING_STAGES
    kind: ClassVar[str] = "ring"
    segments: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"ring of {self.stages} stages"

    @classmethod
    def named(cls, stages: int | None) -> "Ring":
        return cls(stages or RING_STAGES)

    @classmethod
    def considered(cls, ring: int) -> list[Schedule]:
        counts = {2, 3, *(1 << power for power in range(2, ring.bit_length())), ring}
        return [cls(count) for count in sorted(counts) if count <= ring]

    def distances(self, ring: int) -> list[range]:
        """For each later stage, how far away on the ring its keys come from."""
        casts = min(ring - 1, self.stages - 1)
        if casts < 1:
            return []
        bounds = [1 + index * (ring - 1) // casts for index in range(casts + 1)]
        return [range(a, b) for a, b in itertools.pairwise(bounds)]

    def plan(self, demand: KeyDemand | SegmentDemand, position: int) -> AttentionPlan:
        if isinstance(demand, SegmentDemand):
            return plan_staged(self.kind, demand, position, self.distances(demand.positions))
        return plan_ring(self.kind, demand, position, self.distances(demand.positions))

    def passes(self, every: AllPositions) -> Passes:
        if isinstance(every.demand, SegmentDemand):
            return Schedule.passes(self, every)
        return ring_passes(every, self.distances(every.demand.positions))


@dataclass(frozen=True)
class Local(Ring):
    """One position, which has all keys: a ring of its local stage alone."""

    stages: int = 1
    kind: ClassVar[str] = "local"

    @property
    def name(self) -> str:
        return self.kind


def plan_ring(kind: str, demand: KeyDemand, position: int, distances: list[range]) -> AttentionPlan:
    """The stages of a ring position, without an exchange.

    Arguments:
        distances: for each later stage, how far away on the ring its keys come from; all distances are in one of them.
    """
    return _RingPlanner(kind, demand, position, distances).plan()


@dataclass(frozen=True)
class _RingPlanner:
    """Stages of one position."""

    kind: str
    demand: KeyDemand
    position: int
    distances: list[range]

    @property
    def held(self) -> PieceTable:
        return self.demand.pieces

    @property
    def band(self) -> Band:
        return self.demand.band

    def plan(self) -> AttentionPlan:
        local = self._local_blocks()
        casts = self._casts()
        shared_q = shared_rows([block.q for blocks in [local, *(cast.blocks for cast in casts)] for block in blocks])
        returned = [rows for cast in casts for rows in cast.returned]
        routes = [self.demand.routes(self.position, span) for span in self.distances]
        later = [cast.stage(shared_q, *pair) for cast, pair in zip(casts, routes, strict=True)]
        return AttentionPlan(
            schedule=self.kind,
            ring=len(self.held.rows),
            ring_rank=self.position,
            rows=self.held.rows[self.position],
            index=self.held.index[self.position],
            stages=(Stage(group_calls(local, shared_q)), *later),
            shared_q=shared_q,
            shared_k=shared_rows([block.k for block in local], returned),
        )

    def _local_blocks(self) -> list[Block]:
        blocks = []
        for piece in self.held.pieces(self.position):
            blocks += blocks_of(piece, self.held.own(self.position, piece.document), self.band)
        return join_full(blocks)

    def _wanted(self, position: int, document: int) -> list[Range]:
        return union(self.held.needs(piece, self.band) for piece in self.held.own(position, document))

    def _casts(self) -> list[StageBuilder]:
        """The later stages, all in one pass over what travels."""
        casts = [StageBuilder() for _ in self.distances]
        stage_of = {distance: cast for cast, span in zip(casts, self.distances, strict=True) for distance in span}
        for document in self.held.cut_documents(self.position):
            self._arrive(document, stage_of)
            self._leave(document, stage_of)
        for cast in casts:
            cast.blocks = join_full(cast.blocks)
        return casts

    def _arrive(self, document: int, stage_of: dict[int, StageBuilder]) -> None:
        """The keys of a document that this position needs, and its blocks over them."""
        runs: dict[int, tuple[StageBuilder, list[Piece]]] = {}
        start = self.held.docs.starts[document]
        for piece, holder in self._runs(self.position, document):
            cast = stage_of.get((holder - self.position) % len(self.held.rows))
            if cast is None:
                continue
            target = cast.room((start + piece.first, start + piece.last))
            cast.arrive(holder, document, target)
            runs.setdefault(id(cast), (cast, []))[1].append(piece._replace(row=target[0]))
        for query in self.held.own(self.position, document):
            for cast, pieces in runs.values():
                cast.blocks += blocks_of(query, pieces, self.band)

    def _leave(self, document: int, stage_of: dict[int, StageBuilder]) -> None:
        """Local rows that other positions want, in the order of their buffers."""
        own = self.held.own(self.position, document)
        for reader in self.held.readers(document):
            if reader == self.position:
                continue
            cast = stage_of[(self.position - reader) % len(self.held.rows)]
            for want in self._wanted(reader, document):
                cast.leave(reader, want, own)

    def _runs(self, reader: int, document: int) -> Iterator[tuple[Piece, int]]:
        """What `reader` wants of a document, in ascending order: the parts of the holders' pieces, and the holder."""
        for want in self._wanted(reader, document):
            for holder, piece in self.held.holders(document):
                begin, end = overlap(want, (piece.first, piece.last))
                if begin < end:
                    yield Piece(document, begin, end, piece.row + begin - piece.first), holder


def ring_passes(every: AllPositions, distances: list[range]) -> Passes:
    """What the stages of all positions compute and move.

    Rows are counted exactly. The later stages of a position to which rows come are taken as alike but for the rows:
    each piece over an equal share of the pairs that it has left, in a call for each kind of piece; but pieces that see
    all keys of one sender alike are in one call, as far as they lie side by side.
    """
    demand = every.counted
    moved = every.moved(distances)
    arriving = moved.received_rows
    local, left = kept(every, "local stage", lambda: _local_stage(every))
    stages = np.maximum((arriving > 0).sum(0), 1)
    # In packs most positions hear from one or two others, however many stages there are: many rings share this.
    mean = kept(every, ("mean stage", *stages.tolist()), lambda: _mean_stage(every, left, stages))
    share = arriving * stages / np.maximum(arriving.sum(0), 1)
    kernels = [seconds * share for seconds in mean.kernels]
    for seconds, own in zip(kernels, local.kernels, strict=True):
        seconds[0] += own
    merged, calls = mean.rows * share, np.minimum(mean.calls, moved.senders)
    summed = demand.cut_rows * bool(distances)
    merged[0], calls[0] = summed, local.calls
    return every.passes(moved, kernels, calls, merged=merged, shared_q=summed, shared_k=summed)


class _Stage(NamedTuple):
    """One stage of all positions: seconds of its kernels forward and backward, its calls, and the query rows that these
    add to what others left; (positions,)."""

    kernels: tuple[Floats, Floats]
    calls: Ints
    rows: Ints


def _local_stage(every: AllPositions) -> tuple[_Stage, Floats]:
    """All pieces over the keys of their position; and the pairs of query and key that each piece has left."""
    demand = every.counted
    blocks, query, key = demand.own_blocks
    ordinal, position = (query != key).astype(np.int64), demand.position[query]
    forward, backward = (seconds.sum(0) for seconds in every.call_seconds(blocks, ordinal, position))
    # Local pieces, which most are, have no pairs left.
    left = np.zeros(len(demand.first))
    some, of_some = ~demand.local, ~demand.local[query]
    done = sum_by(query[of_some], blocks.where(of_some).areas, len(left))
    left[some] = np.maximum(demand.gathered_blocks.where(some).areas - done[some], 0)
    return _Stage((forward, backward), _distinct(ordinal, position, demand.positions), demand.cut_rows), left


def _mean_stage(every: AllPositions, left: Floats, stages: Ints) -> _Stage:
    """The mean of so many later stages of each position."""
    demand = every.counted
    some = left > 0
    rows, position, ordinal = demand.outer_rows[some], demand.position[some], demand.ordinal[some]
    keys = np.ceil(left[some] / stages[position] / rows).astype(np.int64)
    open_side = np.full(len(rows), -1)
    table = BlockTable(rows, keys, open_side, open_side, open_side, 1)
    forward, backward = (seconds.sum(0) for seconds in every.call_seconds(table, ordinal, position))
    calls = _distinct(ordinal, position, demand.positions)
    return _Stage((forward, backward), calls, sum_by(position, rows, demand.positions))


def _distinct(ordinal: Ints, position: Ints, positions: int) -> Ints:
    """How many different ordinals each position has."""
    found = np.zeros((1 + int(ordinal.max(initial=0)), positions), dtype=np.int64)
    found[ordinal, position] = 1
    return found.sum(0)
