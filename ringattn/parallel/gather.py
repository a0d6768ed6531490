"""The stages of a ring position that gathers all keys it needs and computes each query once over them. Pure integers.

A *gather* computes pieces that see only keys of the position itself while the others' keys are on their way; *joint*
means that all pieces wait, and are one call: for packs so short that another call takes longer than what it would hide.

Each piece that waits has its keys in a run of the buffer of its own, so that a call may compute all of them and writes
every gradient once: what two pieces of a document see stands there twice. Where that would be many rows the pieces
share them and need a call each, which takes less time then than copies of the rows and of their gradients.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator

from ringattn.kernels.spec import Block, Range
from ringattn.mask import Band
from ringattn.parallel.blocks import Piece, blocks_of, group_calls, join_full, shared_rows
from ringattn.parallel.casts import Cast
from ringattn.parallel.demand import Demand
from ringattn.parallel.held import Held
from ringattn.parallel.plan import AttentionPlan, Stage
from ringattn.parallel.ranges import length, overlap, union

Waiting = Callable[[int, int], list[Piece]]  # of a position and a document: its pieces that wait, ascending


def plan_gather(held: Held, demand: Demand, position: int) -> AttentionPlan:
    """The stages of a ring position, without an exchange; `demand` is that of `held`."""

    def waiting(reader: int, document: int) -> list[Piece]:
        parts = [part for piece in held.own(reader, document) for part in held.parted(piece, demand.band)]
        return [part for part in parts if held.local_run(reader, part, demand.band) is None]

    local = _local_blocks(held, position, demand.band)
    documents = held.cut_documents(position)
    return _plan("gather", held, demand.parted, position, local, documents, waiting)


def plan_joint(held: Held, demand: Demand, position: int) -> AttentionPlan:
    """The same, with all pieces waiting."""
    documents = list(dict.fromkeys(piece.document for piece in held.pieces(position)))
    return _plan("joint", held, demand.joint, position, [], documents, held.own)


def _local_blocks(held: Held, position: int, band: Band) -> list[Block]:
    """Those of pieces that see only keys of the position."""
    blocks = []
    for piece in held.pieces(position):
        for part in held.parted(piece, band):
            run = held.local_run(position, part, band)
            blocks += blocks_of(part, [] if run is None else [run], band)
    return join_full(blocks)


def _plan(
    schedule: str,
    held: Held,
    demand: Demand,
    position: int,
    local: list[Block],
    documents: list[int],
    waiting: Waiting,
) -> AttentionPlan:
    """Stages of which the first has these local blocks.

    Arguments:
        demand: of the pieces that wait.
        documents: of the position, those that may have some.
    """
    cast = Cast()
    queries = [piece for document in documents for piece in waiting(position, document)]
    wanted: dict[int, list[Range]] = defaultdict(list)
    for query in queries:
        wanted[query.document].append(held.needs(query, demand.band))
    buffer = {
        document: _DocumentKeys(cast, held, position, document, own, demand.most_repeated)
        for document, own in wanted.items()
    }
    for query in sorted(queries, key=lambda piece: piece.row):  # a call's keys are in the order of its queries
        cast.blocks += blocks_of(query, buffer[query.document].run(held.needs(query, demand.band)), demand.band)
    cast.blocks = join_full(cast.blocks)
    for document in held.cut_documents(position):
        for reader in held.readers(document):
            if reader != position:
                for keys in union(held.needs(piece, demand.band) for piece in waiting(reader, document)):
                    cast.leave(reader, keys, held.own(position, document))
    routes = demand.routes(position, range(1, len(held.rows)))
    shared_q = shared_rows([block.q for block in (*local, *cast.blocks)])
    return AttentionPlan(
        schedule=schedule,
        ring=len(held.rows),
        ring_rank=position,
        rows=held.rows[position],
        index=held.index[position],
        stages=(Stage(group_calls(local, shared_q)), cast.stage(shared_q, *routes)),
        shared_q=shared_q,
        shared_k=shared_rows([block.k for block in local], cast.returned),
    )


class _DocumentKeys:
    """The keys of a document in the buffer of a position.

    Arguments:
        wanted: by its pieces that wait.
        most_repeated: rows that may stand there once more, since several of them want them.
    """

    def __init__(
        self, cast: Cast, held: Held, position: int, document: int, wanted: list[Range], most_repeated: float
    ) -> None:
        self.cast, self.position, self.document = cast, position, document
        self._start, self._holders = held.docs.starts[document], held.holders(document)
        self._union = union(wanted)
        self._shared = length(wanted) - length(self._union) > most_repeated
        self._arrived: list[Piece] = []  # at their rows of the buffer, each once
        self._last: tuple[list[Range], list[Piece]] = [], []

    def run(self, wanted: Range) -> list[Piece]:
        """Rows of the buffer with the keys at these positions of the document, one after another, or with more if they
        are shared. From call to call neither bound may fall."""
        ranges = self._union if self._shared else [wanted]
        if ranges != self._last[0]:
            self._last = ranges, [piece for one in ranges for piece in self._placed(one)]
        return self._last[1]

    def _placed(self, wanted: Range) -> Iterator[Piece]:
        """New rows of the buffer for these keys."""
        for holder, piece in self._holders:
            first, last = overlap(wanted, (piece.first, piece.last))
            if first < last:
                at = Piece(self.document, first, last, piece.row + first - piece.first)
                yield from [self._copied(at)] if holder == self.position else self._moved(at, holder)

    def _room(self, first: int, last: int) -> Piece:
        row, _ = self.cast.room((self._start + first, self._start + last))
        return Piece(self.document, first, last, row)

    def _copied(self, local: Piece) -> Piece:
        """Rows of this position, at their place in the buffer."""
        placed = self._room(local.first, local.last)
        self.cast.copy((local.row, local.stop_row), (placed.row, placed.stop_row))
        return placed

    def _moved(self, remote: Piece, holder: int) -> list[Piece]:
        """Rows of another position: those that are in the buffer already stand there once more."""
        placed = []
        begin = remote.first
        for there in self._arrived:
            first, last = overlap((begin, remote.last), (there.first, there.last))
            if first < last:
                again = self._room(first, last)
                source = there.row + first - there.first
                self.cast.repeats.append(((source, source + last - first), (again.row, again.stop_row)))
                placed.append(again)
                begin = last
        if begin < remote.last:
            new = self._room(begin, remote.last)
            self.cast.arrive(holder, self.document, (new.row, new.stop_row))
            self._arrived.append(new)
            placed.append(new)
        return placed
