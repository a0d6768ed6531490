"""From layout and mask to plan. Every rank computes its part from the same integers, without communication."""

import itertools
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from ringattn.documents import Documents
from ringattn.kernels.spec import Block, Range
from ringattn.mask import Band, Mask
from ringattn.parallel.blocks import Piece, blocks_of, group_calls, join_full, shared_rows
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh import MeshShape
from ringattn.parallel.plan import AttentionPlan, Exchange, Message, Stage
from ringattn.parallel.ranges import length, overlap, union
from ringattn.parallel.ulysses import exchange_plan

SCHEMES = ("auto", "ring", "ulysses", "hybrid", "gather")
RING_STAGES = 4  # the local stage and three casts overlap well and need only two key buffers
GATHER_SHARE = 8  # remote keys, as a multiple of a rank's own, up to which they are gathered at once
DIRECT_SEGMENTS = 4  # up to this many runs between two ranks travel as they lie; more are packed into one message


def plan_attention(
    layout: Layout,
    mask: Mask,
    query_heads: int,
    key_heads: int,
    scheme: str = "auto",
    stages: int | None = None,
    keep_keys: bool = False,
    wide_reduce: bool = True,
) -> AttentionPlan:
    """The plan of this rank for one attention; kept with the layout, since every layer asks for the same.

    Arguments:
        scheme: "gather" or "ring" name how keys move on the ring axis; "ulysses" and "hybrid" check that the mesh has
            those axes and leave the ring axis to "auto".
        stages: number of stages of the ring schedule, the local one included.
        keep_keys, wide_reduce: see `AttentionPlan`.

    Raises ValueError naming the argument, with the numbers.
    """
    check_scheme(scheme, layout.mesh, stages)
    key = (mask, query_heads, key_heads, scheme, stages, keep_keys, wide_reduce)
    if key not in layout._plans:
        plan = _plan(layout, mask, query_heads, key_heads, scheme, stages)
        layout._plans[key] = replace(plan, keep_keys=keep_keys, wide_reduce=wide_reduce)
    return layout._plans[key]


def _plan(
    layout: Layout, mask: Mask, query_heads: int, key_heads: int, scheme: str, stages: int | None
) -> AttentionPlan:
    mesh = layout.mesh
    exchange: Exchange | None = None
    if mesh.ulysses > 1:
        exchange = exchange_plan(layout.deal(mesh.ring_rank), query_heads, key_heads, mesh.ulysses_rank)
    held_key = ("held", mask.chunk)
    if held_key not in layout._plans:
        layout._plans[held_key] = Held.of(layout, mask)
    held: Held = layout._plans[held_key]
    schedule, reason = _schedule(held, mask.band, scheme)
    planner = _RingPlanner(held, mask.band, mesh.ring_rank, schedule, _distances(mesh.ring, schedule, stages))
    return planner.plan(exchange, reason)


def check_scheme(scheme: str, mesh: MeshShape, stages: int | None = None) -> None:
    """Raises ValueError, with the degrees, if `scheme` cannot run on the axes of `mesh`."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    degrees = f"the mesh has ring={mesh.ring} and ulysses={mesh.ulysses}"
    if mesh.sequence_size > 1:
        if scheme in ("ring", "gather") and mesh.ring == 1:
            raise ValueError(f'scheme="{scheme}" moves keys on the ring axis and needs ring > 1; {degrees}')
        if scheme == "ulysses" and mesh.ring > 1:
            raise ValueError(f'scheme="ulysses" needs ring = 1; {degrees}: use "hybrid"')
        if scheme == "hybrid" and 1 in (mesh.ring, mesh.ulysses):
            raise ValueError(f'scheme="hybrid" needs ring > 1 and ulysses > 1; {degrees}')
    if stages is not None:
        if not isinstance(stages, int) or stages < 2:
            raise ValueError(f"stages must be an integer >= 2 (the local one and at least one cast), got {stages!r}")
        if scheme != "ring":
            raise ValueError(f'stages belongs to scheme="ring", got stages={stages} with scheme="{scheme}"')


def _schedule(held: "Held", band: Band, scheme: str) -> tuple[str, str]:
    ring = len(held.positions)
    if ring == 1:
        return "local", "the ring axis has one position"
    if scheme in ("ring", "gather"):
        return scheme, f'scheme="{scheme}" was asked for'
    share = held.fetched_share(band)
    need = f"a rank needs up to {share:.2f} × its own keys from others"
    if share <= GATHER_SHARE:
        return "gather", f"{need}, at most {GATHER_SHARE}: they fit, and each query row is computed in one call"
    return "ring", f"{need}, more than {GATHER_SHARE}: stages bound the memory"


def _distances(ring: int, schedule: str, stages: int | None) -> list[range]:
    """For each later stage, how far away on the ring its keys come from."""
    if ring == 1:
        return []
    if schedule == "gather":
        return [range(1, ring)]
    casts = min(ring - 1, (stages or RING_STAGES) - 1)
    bounds = [1 + index * (ring - 1) // casts for index in range(casts + 1)]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


@dataclass(frozen=True)
class Held:
    """Every position's pieces of the documents as attention sees them (chunks are documents)."""

    docs: Documents
    positions: tuple[tuple[Piece, ...], ...]
    rows: tuple[int, ...]  # of every position, padding included
    index: tuple[tuple[Range, ...], ...]  # of every position: the global ranges of its rows

    @classmethod
    def of(cls, layout: Layout, mask: Mask) -> "Held":
        docs = layout.docs.chunked(mask.chunk)
        spans = [(start, index) for index, start in enumerate(docs.starts) if docs.lengths[index]]
        starts = [start for start, _ in spans]
        positions = []
        for ranges in layout.positions:
            pieces, row = [], 0
            for begin, end in ranges:
                # The document before the first start at or after `begin` may reach into the range.
                number = max(0, bisect_left(starts, begin) - 1)
                while number < len(spans) and spans[number][0] < end:
                    start, index = spans[number]
                    first, last = overlap((begin, end), (start, start + docs.lengths[index]))
                    if first < last:
                        pieces.append(Piece(index, first - start, last - start, row + first - begin))
                    number += 1
                row += end - begin
            positions.append(tuple(pieces))
        return cls(docs, tuple(positions), layout.position_sizes, layout.positions)

    @cached_property
    def by_document(self) -> dict[int, list[tuple[int, Piece]]]:
        """For each document its `(position, piece)` in ascending order: where each of its keys is."""
        holders: dict[int, list[tuple[int, Piece]]] = defaultdict(list)
        for position, pieces in enumerate(self.positions):
            for piece in pieces:
                holders[piece.document].append((position, piece))
        for pairs in holders.values():
            pairs.sort(key=lambda pair: pair[1].first)
        return holders

    @cached_property
    def _own(self) -> dict[tuple[int, int], list[Piece]]:
        own: dict[tuple[int, int], list[Piece]] = defaultdict(list)
        for document, pairs in self.by_document.items():
            for position, piece in pairs:
                own[position, document].append(piece)
        return own

    def own(self, position: int, document: int) -> list[Piece]:
        """The pieces of a document at a position, in ascending order."""
        return self._own.get((position, document), [])

    @cached_property
    def readers(self) -> dict[int, list[int]]:
        """The positions that hold queries of each document."""
        return {document: sorted({position for position, _ in pairs}) for document, pairs in self.by_document.items()}

    @cached_property
    def cut_documents(self) -> list[list[int]]:
        """For each position its documents that are also held elsewhere, in stream order: only they communicate."""
        out: list[list[int]] = [[] for _ in self.positions]
        for document, readers in sorted(self.readers.items()):
            if len(readers) > 1:
                for position in readers:
                    out[position].append(document)
        return out

    def needs(self, piece: Piece, band: Band) -> Range:
        return band.keys_of(piece.first, piece.last, self.docs.lengths[piece.document])

    def local_run(self, position: int, piece: Piece, band: Band) -> Piece | None:
        """The piece of the same position that holds all keys of `piece`, if there is one."""
        first, last = self.needs(piece, band)
        return next(
            (run for run in self.own(position, piece.document) if run.first <= first and last <= run.last), None
        )

    def fetched_share(self, band: Band) -> float:
        """Remote key rows that a position needs, as a multiple of its own rows: the largest of all positions."""
        return max(
            (self._fetched_rows(position, band) / rows for position, rows in enumerate(self.rows) if rows), default=0.0
        )

    def _fetched_rows(self, position: int, band: Band) -> int:
        rows = 0
        for document in self.cut_documents[position]:
            own = self.own(position, document)
            for need in union(self.needs(piece, band) for piece in own):
                held = length(union(overlap(need, (piece.first, piece.last)) for piece in own))
                rows += need[1] - need[0] - held
        return rows


@dataclass
class _Cast:
    """One later stage under construction: a buffer's rows, where they come from, and what this position sends."""

    rows: int = 0
    index: list[Range] = field(default_factory=list)  # global
    copies: tuple[tuple[Range, Range], ...] = ()
    blocks: list[Block] = field(default_factory=list)
    sends: tuple[Message, ...] = ()
    receives: tuple[Message, ...] = ()

    def stage(self, shared_q: Range) -> Stage:
        calls = group_calls(self.blocks, shared_q)
        return Stage(calls, self.rows, tuple(self.index), self.copies, self.sends, self.receives)


@dataclass(frozen=True)
class _RingPlanner:
    """Stages of one position. "gather" computes each query row once over all its keys, "ring" once per stage."""

    held: Held
    band: Band
    position: int
    schedule: str
    distances: list[range]

    def plan(self, exchange: Exchange | None, reason: str) -> AttentionPlan:
        local = self._local_blocks()
        casts = [self._cast(distances) for distances in self.distances]
        shared_q = shared_rows([block.q for blocks in [local, *(cast.blocks for cast in casts)] for block in blocks])
        returned = [rows for cast in casts for rows, _ in cast.copies]
        returned += [rows for cast in casts for message in cast.sends for rows in message.ranges]
        return AttentionPlan(
            schedule=self.schedule,
            ring=len(self.held.positions),
            ring_rank=self.position,
            rows=self.held.rows[self.position],
            index=self.held.index[self.position],
            stages=(Stage(group_calls(local, shared_q)), *(cast.stage(shared_q) for cast in casts)),
            shared_q=shared_q,
            shared_k=shared_rows([block.k for block in local], returned),
            exchange=exchange,
            reason=reason,
        )

    def _local_blocks(self) -> list[Block]:
        blocks = []
        for piece in self.held.positions[self.position]:
            if self.schedule == "gather":
                run = self.held.local_run(self.position, piece, self.band)
                runs = [] if run is None else [run]
            else:
                runs = self.held.own(self.position, piece.document)
            blocks += blocks_of(piece, runs, self.band)
        return join_full(blocks)

    def _casting(self, position: int, document: int) -> list[Piece]:
        """The pieces of a document at `position` whose keys are cast."""
        own = self.held.own(position, document)
        if self.schedule == "gather":
            return [piece for piece in own if self.held.local_run(position, piece, self.band) is None]
        return own

    def _wanted(self, position: int, document: int) -> list[Range]:
        return union(self.held.needs(piece, self.band) for piece in self._casting(position, document))

    def _cast(self, distances: range) -> _Cast:
        cast = _Cast()
        copies: list[tuple[Range, Range]] = []
        arriving: dict[int, list[Range]] = defaultdict(list)
        for document in self.held.cut_documents[self.position]:
            runs = []
            for piece, holder in self._runs(self.position, document):
                target = cast.rows, cast.rows + piece.last - piece.first
                if holder == self.position and self.schedule == "gather":
                    copies.append(((piece.row, piece.stop_row), target))
                elif (holder - self.position) % len(self.held.positions) in distances:
                    arriving[holder].append(target)
                else:
                    continue
                runs.append(piece._replace(row=cast.rows))
                start = self.held.docs.starts[document]
                cast.index.append((start + piece.first, start + piece.last))
                cast.rows = target[1]
            for query in self._casting(self.position, document):
                cast.blocks += blocks_of(query, runs, self.band)
        cast.blocks = join_full(cast.blocks)
        cast.copies = tuple(copies)
        cast.receives = _messages(arriving)
        cast.sends = _messages(self._leaving(distances))
        return cast

    def _leaving(self, distances: range) -> dict[int, list[Range]]:
        """Local rows that other positions want in the same stage, in the order of their buffers."""
        leaving: dict[int, list[Range]] = defaultdict(list)
        for document in self.held.cut_documents[self.position]:
            own = self.held.own(self.position, document)
            for reader in self.held.readers[document]:
                if (self.position - reader) % len(self.held.positions) in distances:
                    for want in self._wanted(reader, document):
                        for piece in own:
                            first, last = overlap(want, (piece.first, piece.last))
                            if first < last:
                                shift = piece.row - piece.first
                                leaving[reader].append((first + shift, last + shift))
        return leaving

    def _runs(self, reader: int, document: int) -> Iterator[tuple[Piece, int]]:
        """What `reader` wants of a document, in ascending order: the parts of the holders' pieces, and the holder."""
        for want in self._wanted(reader, document):
            for holder, piece in self.held.by_document[document]:
                begin, end = overlap(want, (piece.first, piece.last))
                if begin < end:
                    yield Piece(document, begin, end, piece.row + begin - piece.first), holder


def _messages(segments: dict[int, list[Range]]) -> tuple[Message, ...]:
    """One message per segment where they are few, so that both ends send and receive in place; else one per peer."""
    messages: list[Message] = []
    for peer in sorted(segments):
        parts = segments[peer]
        if len(parts) <= DIRECT_SEGMENTS:
            messages += [Message(peer, (part,)) for part in parts]
        else:
            messages.append(Message(peer, tuple(parts)))
    return tuple(messages)
