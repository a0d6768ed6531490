"""The stages of a ring position that waits for all of its keys and then computes everything in one call. Pure integers.

Nothing hides the transfer, but for packs so short that the host takes longer to launch a second call than the device
to compute it that is faster. So that one call can do it each query piece has its keys in a run of its own: where two
pieces of a document want the same keys, these stand twice in the buffer.
"""

from ringattn.kernels.spec import Range
from ringattn.parallel.blocks import Piece, blocks_of, join_full
from ringattn.parallel.casts import Cast
from ringattn.parallel.demand import Demand
from ringattn.parallel.held import Held
from ringattn.parallel.plan import AttentionPlan, Stage
from ringattn.parallel.ranges import overlap, union


def plan_joint(held: Held, demand: Demand, position: int) -> AttentionPlan:
    """The stages of a ring position, without an exchange; `demand` is that of `held`."""
    cast = Cast()
    keys: dict[int, _DocumentKeys] = {}
    for query in held.pieces(position):
        own = keys.setdefault(query.document, _DocumentKeys(cast, held, position, query.document))
        cast.blocks += blocks_of(query, own.of(query, held.needs(query, demand.band)), demand.band)
    cast.blocks = join_full(cast.blocks)
    for document in held.cut_documents(position):
        for reader in held.readers(document):
            if reader != position:
                for wanted in union(held.needs(piece, demand.band) for piece in held.own(reader, document)):
                    cast.leave(reader, wanted, held.own(position, document))
    return AttentionPlan(
        schedule="joint",
        ring=len(held.rows),
        ring_rank=position,
        rows=held.rows[position],
        index=held.index[position],
        stages=(Stage(()), cast.stage((0, 0), *demand.joint.routes(position, range(1, len(held.rows))))),
        shared_q=(0, 0),
        shared_k=(0, 0),
    )


class _DocumentKeys:
    """The keys of a document in the buffer of a position, as its pieces ask for them in the order of their rows."""

    def __init__(self, cast: Cast, held: Held, position: int, document: int) -> None:
        self.cast, self.position, self.document = cast, position, document
        self._start, self._holders = held.docs.starts[document], held.holders(document)
        self._arrived: list[Piece] = []  # at their rows of the buffer, each once
        self._last: tuple[int, Range, list[Piece]] = -1, (0, 0), []  # the row that would continue it, keys, runs

    def of(self, query: Piece, wanted: Range) -> list[Piece]:
        """A run of the buffer with the keys at these positions of the document, which is the last one if `query`
        continues the query of that and sees the same. Both bounds of `wanted` never fall."""
        row, last_wanted, runs = self._last
        if (row, last_wanted) != (query.row, wanted):
            runs = []
            for holder, piece in self._holders:
                first, last = overlap(wanted, (piece.first, piece.last))
                if first < last:
                    at = Piece(self.document, first, last, piece.row + first - piece.first)
                    runs += [self._copied(at)] if holder == self.position else self._moved(at, holder)
        self._last = query.stop_row, wanted, runs
        return runs

    def _room(self, piece: Piece) -> Piece:
        row, _ = self.cast.room((self._start + piece.first, self._start + piece.last))
        return piece._replace(row=row)

    def _copied(self, local: Piece) -> Piece:
        """Rows of this position, at their place in the buffer."""
        placed = self._room(local)
        self.cast.copy((local.row, local.stop_row), (placed.row, placed.stop_row))
        return placed

    def _moved(self, remote: Piece, holder: int) -> list[Piece]:
        """Rows of another position: those that are there already stand in the buffer once more."""
        placed = []
        begin = remote.first
        for there in self._arrived:
            first, last = overlap((begin, remote.last), (there.first, there.last))
            if first < last:
                again = self._room(Piece(self.document, first, last, 0))
                source = there.row + first - there.first
                self.cast.repeats.append(((source, source + last - first), (again.row, again.stop_row)))
                placed.append(again)
                begin = last
        if begin < remote.last:
            new = self._room(Piece(self.document, begin, remote.last, 0))
            self.cast.arrive(holder, self.document, (new.row, new.stop_row))
            self._arrived.append(new)
            placed.append(new)
        return placed
