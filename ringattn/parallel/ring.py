"""The stages of a ring position that computes what it can from local keys while others are on their way: all of them
("gather"), or those of some ranks after those of others ("ring"). Pure integers."""

from collections.abc import Iterator
from dataclasses import dataclass

from ringattn.kernels.spec import Block, Range
from ringattn.mask import Band
from ringattn.parallel.blocks import Piece, blocks_of, group_calls, join_full, shared_rows
from ringattn.parallel.casts import Cast
from ringattn.parallel.demand import Demand
from ringattn.parallel.held import Held
from ringattn.parallel.plan import AttentionPlan, Stage
from ringattn.parallel.pricing import Candidate
from ringattn.parallel.ranges import overlap, union


def plan_ring(held: Held, demand: Demand, position: int, candidate: Candidate) -> AttentionPlan:
    """The stages of a ring position, without an exchange; `demand` is that of `held`."""
    return _RingPlanner(held, demand, position, candidate.schedule, candidate.distances(len(held.rows))).plan()


@dataclass(frozen=True)
class _RingPlanner:
    """Stages of one position. "gather" computes each query row once over all its keys, "ring" once per stage."""

    held: Held
    demand: Demand
    position: int
    schedule: str
    distances: list[range]

    @property
    def band(self) -> Band:
        return self.demand.band

    def plan(self) -> AttentionPlan:
        local = self._local_blocks()
        casts = self._casts()
        shared_q = shared_rows([block.q for blocks in [local, *(cast.blocks for cast in casts)] for block in blocks])
        returned = [rows for cast in casts for rows in cast.returned]
        demand = self.demand.parted if self.schedule == "gather" else self.demand
        routes = [demand.routes(self.position, span) for span in self.distances]
        later = [cast.stage(shared_q, *pair) for cast, pair in zip(casts, routes, strict=True)]
        return AttentionPlan(
            schedule=self.schedule,
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
            if self.schedule != "gather":
                blocks += blocks_of(piece, self.held.own(self.position, piece.document), self.band)
                continue
            for part in self.held.parted(piece, self.band):
                run = self.held.local_run(self.position, part, self.band)
                blocks += blocks_of(part, [] if run is None else [run], self.band)
        return join_full(blocks)

    def _casting(self, position: int, document: int) -> list[Piece]:
        """The pieces of a document at `position` whose keys are cast."""
        own = self.held.own(position, document)
        if self.schedule != "gather":
            return own
        parts = [part for piece in own for part in self.held.parted(piece, self.band)]
        return [part for part in parts if self.held.local_run(position, part, self.band) is None]

    def _wanted(self, position: int, document: int) -> list[Range]:
        return union(self.held.needs(piece, self.band) for piece in self._casting(position, document))

    def _casts(self) -> list[Cast]:
        """The later stages, all in one pass over what travels."""
        casts = [Cast() for _ in self.distances]
        stage_of = {distance: cast for cast, span in zip(casts, self.distances, strict=True) for distance in span}
        if self.schedule == "gather":
            stage_of[0] = casts[0]  # the local rows among the keys are copied
        for document in self.held.cut_documents(self.position):
            self._arrive(document, stage_of)
            self._leave(document, stage_of)
        for cast in casts:
            cast.blocks = join_full(cast.blocks)
        return casts

    def _arrive(self, document: int, stage_of: dict[int, Cast]) -> None:
        """The keys of a document that this position needs, and its blocks over them."""
        runs: dict[int, tuple[Cast, list[Piece]]] = {}
        start = self.held.docs.starts[document]
        for piece, holder in self._runs(self.position, document):
            cast = stage_of.get((holder - self.position) % len(self.held.rows))
            if cast is None:
                continue
            target = cast.room((start + piece.first, start + piece.last))
            if holder == self.position:
                cast.copy((piece.row, piece.stop_row), target)
            else:
                cast.arrive(holder, document, target)
            runs.setdefault(id(cast), (cast, []))[1].append(piece._replace(row=target[0]))
        for query in self._casting(self.position, document):
            for cast, pieces in runs.values():
                cast.blocks += blocks_of(query, pieces, self.band)

    def _leave(self, document: int, stage_of: dict[int, Cast]) -> None:
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
