"""The stages of a ring position that computes what it can from its own keys while those of some ranks are on their way,
then from these while others' are: each query once per stage. Pure integers."""

from collections.abc import Iterator
from dataclasses import dataclass

from ringattn.kernels.spec import Block, Range
from ringattn.mask import Band
from ringattn.parallel.geometry.blocks import Piece, blocks_of, group_calls, join_full, shared_rows
from ringattn.parallel.geometry.ranges import overlap, union
from ringattn.parallel.placement.pieces import PieceTable
from ringattn.parallel.plan.plan import AttentionPlan, Stage
from ringattn.parallel.schedules.demand import KeyDemand
from ringattn.parallel.schedules.stage_builder import StageBuilder


def plan_ring(held: PieceTable, demand: KeyDemand, position: int, distances: list[range]) -> AttentionPlan:
    """The stages of a ring position, without an exchange; `demand` is that of `held`.

    Arguments:
        distances: for each later stage, how far away on the ring its keys come from.
    """
    return _RingPlanner(held, demand, position, distances).plan()


@dataclass(frozen=True)
class _RingPlanner:
    """Stages of one position."""

    held: PieceTable
    demand: KeyDemand
    position: int
    distances: list[range]

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
            schedule="ring" if self.distances else "local",
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
