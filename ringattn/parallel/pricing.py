"""What a schedule costs all ring positions, in closed forms, without building their plans.

What positions need of one another is counted exactly; inside the later stages of a ring the work of a position is
spread in proportion to the rows that arrive.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ringattn.parallel.cost import (
    DirectionCost,
    StageCost,
    backward_timeline,
    calls_seconds,
    disturbed,
    exchange_loss,
    exchange_seconds,
    forward_timeline,
    host_seconds,
)
from ringattn.parallel.demand import Demand, per
from ringattn.parallel.layout import Layout
from ringattn.parallel.machine import CLASSES, Machine
from ringattn.parallel.memory import (
    StageRows,
    exchange_bytes,
    exchange_message_bytes,
    largest_pair,
    message_buffers,
)
from ringattn.parallel.messages import exchange_messages
from ringattn.parallel.plan import Exchange, Shape
from ringattn.parallel.rates import BlockTable, Floats, Ints
from ringattn.parallel.ulysses import exchange_plan


@dataclass(frozen=True)
class Candidate:
    """A way to move keys on the ring axis: "local", "gather" (one later stage), or "ring" with `stages` in all."""

    schedule: str
    stages: int

    @property
    def name(self) -> str:
        return f"ring of {self.stages} stages" if self.schedule == "ring" else self.schedule

    def distances(self, ring: int) -> list[range]:
        """For each later stage, how far away on the ring its keys come from."""
        casts = min(ring - 1, self.stages - 1)
        if casts < 1:
            return []
        bounds = [1 + index * (ring - 1) // casts for index in range(casts + 1)]
        return [range(a, b) for a, b in itertools.pairwise(bounds)]


@dataclass(frozen=True)
class Setting:
    """What prices depend on beside the pieces.

    Arguments:
        shape: the model's.
        exchange: of one rank of the sequence group, the same one whoever asks.
        keep_keys: keep cast keys for the backward pass; None: if that is predicted to be faster and there is room.
    """

    machine: Machine
    shape: Shape
    exchange: Exchange | None = None
    keep_keys: bool | None = None
    wide_reduce: bool = True

    def on(self, layout: Layout) -> "Setting":
        """The same with the exchange that the mesh of a layout (not parted) asks for."""
        if layout.mesh.ulysses == 1:
            return replace(self, exchange=None)
        return replace(self, exchange=exchange_plan(layout.deal(0), self.shape.query_heads, self.shape.key_heads, 0))

    @property
    def ulysses(self) -> int:
        return 1 if self.exchange is None else len(self.exchange.rows)

    @property
    def own(self) -> Shape:
        """The largest share of the heads."""
        if self.exchange is None:
            return self.shape
        exchanges = [replace(self.exchange, rank=rank) for rank in range(self.ulysses)]
        shares = [self.shape.share(exchange) for exchange in exchanges]
        return max(shares, key=lambda share: (share.query_heads, share.key_heads))


@dataclass(frozen=True)
class Price:
    """A candidate in one direction, for every position as arrays: seconds of compute, wire and waiting, and bytes.

    Arguments:
        waiting: of kernels, for transfers.
        lost: that kernels would lose, were all that is waited for to travel beside them.
        host: that it takes to issue everything.
        pair_share: key rows of two buffers at a time over the position's own rows, the largest of all positions.
        messages: bytes of the message buffers of copy engines, which are there in both passes.
        kept: bytes of all cast keys, the most of all positions.
        kept_share: the same over q, k, v and out of the position, of which each rank saves its share.
    """

    candidate: Candidate
    compute: Floats
    wire: Floats
    waiting: Floats
    lost: Floats
    host: Floats
    bytes: Any
    messages: int
    pair_share: float
    kept: int
    kept_share: float

    @cached_property
    def slowest(self) -> DirectionCost:
        """The position that decides."""
        return _slowest(self.compute, self.wire, self.waiting, self.host)

    @property
    def seconds(self) -> float:
        return self.slowest.seconds


def most_bytes(prices: Sequence[Price]) -> int:
    """What the passes of these prices need at one time, on the rank that needs most."""
    return max(int(np.max(price.bytes, initial=0)) for price in prices) + max(price.messages for price in prices)


def together(a: Price, b: Price) -> DirectionCost:
    """Two attentions of the same ranks in one direction, run so that each computes while the other's keys travel.

    What one waits for is hidden as far as the other's kernels last: an exchange of heads, both ways, under the kernels
    on the ring axis, and their cast under the kernels between the two ways. So far it disturbs them, as any transfer
    beside kernels does. The host issues one after the other. Neighbouring ranks share a position, of as many as each
    ring has.
    """
    ranks = math.lcm(len(a.compute), len(b.compute))
    compute, wire, waiting, lost, host = (
        [np.repeat(getattr(price, name), ranks // len(price.compute)) for price in (a, b)]
        for name in ("compute", "wire", "waiting", "lost", "host")
    )
    hidden = [np.minimum(waiting[0], compute[1]), np.minimum(waiting[1], compute[0])]
    exposed = sum(waiting) - sum(hidden)
    disturbance = sum(
        loss * under / np.maximum(all_of, 1e-12) for loss, under, all_of in zip(lost, hidden, waiting, strict=True)
    )
    return _slowest(compute[0] + compute[1] + disturbance, wire[0] + wire[1], exposed, host[0] + host[1])


def _slowest(compute: Floats, wire: Floats, waiting: Floats, host: Floats) -> DirectionCost:
    exposed = np.maximum(waiting, host - compute)
    at = int(np.argmax(compute + exposed))
    return DirectionCost(float(compute[at]), float(wire[at]), float(exposed[at]))


@dataclass(frozen=True)
class Pricer:
    """Prices of candidates; what they share is computed once."""

    demand: Demand
    setting: Setting

    def price(self, candidate: Candidate, keep_keys: bool | None = None) -> tuple[Price, Price]:
        """Of the forward and of the backward pass; with keys kept if the setting says so, or what is said here."""
        keep = bool(self.setting.keep_keys if keep_keys is None else keep_keys)
        distances = candidate.distances(self.demand.positions)
        received, sent = self._rows(distances)
        gather = candidate.schedule == "gather"
        copied = self._copied if gather else np.zeros(self.demand.positions)
        buffers = received.sum(1) + copied
        rows = StageRows(
            buffers=list(buffers),
            received=list(received.sum(1)),
            sent=list(sent.sum(1)),
            shared_q=0 if gather else self.demand.cut_rows * bool(distances),
            shared_k=self.demand.cut_rows if distances else 0,
            most_sent=int(sent.sum(1).max(initial=0)),
            most_returned=int(received.sum(1).max(initial=0)),
            engines="ring" in self.setting.machine.engines,
        )
        pair_share = float(np.max(largest_pair(rows.buffers) / np.maximum(self.demand.rows, 1), initial=0.0))
        setting, own = self.setting, self.setting.own
        sizes = rows.forward_bytes(own, keep), rows.backward_bytes(own, keep, setting.wide_reduce)
        kept = sum(rows.buffers) * own.key_row_bytes + np.zeros(self.demand.positions)
        kept_share = float(np.max(kept / np.maximum(self.demand.rows * own.row_bytes, 1), initial=0.0))
        kept_keys = int(np.max(kept, initial=0)), kept_share
        exchanged = 0
        if setting.exchange is not None:
            exchanged = exchange_bytes(setting.shape, own, self.demand.rows, -(-self.demand.rows // setting.ulysses))
        forward, backward = (
            self._directed(
                candidate, direction, received, sent, copied, keep, (size + exchanged, messages, pair_share, *kept_keys)
            )
            for direction, (size, messages) in enumerate(zip(sizes, self._message_buffers(rows, keep), strict=True))
        )
        return forward, backward

    def _directed(
        self,
        candidate: Candidate,
        direction: int,
        received: Ints,
        sent: Ints,
        copied: Floats,
        keep: bool,
        room: tuple[Any, int, float, int, float],
    ) -> Price:
        """One direction; `received` and `sent` are (stages, class of link, position) rows."""
        setting, machine, own, backward = self.setting, self.setting.machine, self.setting.own, bool(direction)
        local, later = self._gathered[direction] if candidate.schedule == "gather" else self._staged(received, backward)
        cast = reduce = lost = np.zeros(later.shape)
        if not (backward and keep):
            cast, lost = self._wire(received, sent, own.key_row_bytes)
            rows = received.sum(1) + sent.sum(1) + copied
            later = later + _linear(rows, 2 * machine.copy_seconds, 2 * own.key_row_bytes / machine.copy_bandwidth)
        if backward:
            row_bytes = own.wide_key_row_bytes if setting.wide_reduce else own.key_row_bytes
            reduce, lost_by_reduce = self._wire(received, sent, row_bytes)
            lost = lost + lost_by_reduce
            rows = 2 * received.sum(1) + 3 * sent.sum(1) + 3 * copied
            later = later + _linear(rows, 2 * machine.copy_seconds, own.wide_key_row_bytes / machine.merge_bandwidth)
        stages = [StageCost(local)]
        stages += [
            StageCost(seconds, there, back, lost=more)
            for seconds, there, back, more in zip(later, cast, reduce, lost, strict=True)
        ]
        exposed = (backward_timeline if backward else forward_timeline)(stages) + np.zeros(len(local))
        wire, copies = exchange_seconds(machine, setting.exchange, 0, setting.shape, backward, setting.wide_reduce)
        disturbance = disturbed(stages, exposed)
        compute = local + later.sum(0) + disturbance + copies
        host = host_seconds(
            machine,
            calls=self._calls + (len(later) > 0),
            casts=0 if backward and keep else len(later),
            reduces=len(later) if backward else 0,
            exchanged=setting.exchange is not None,
            messages=self._messages,
            backward=backward,
        )
        return Price(
            candidate,
            compute=compute,
            wire=cast.sum(0) + reduce.sum(0) + wire,
            waiting=exposed + wire,
            lost=sum(stage.lost for stage in stages) - disturbance + self._exchange_loss(wire, backward),
            host=host,
            bytes=room[0],
            messages=room[1],
            pair_share=room[2],
            kept=room[3],
            kept_share=room[4],
        )

    def _exchange_loss(self, wire: float, backward: bool) -> float:
        setting = self.setting
        if setting.exchange is None:
            return 0.0
        there, back = exchange_messages(setting.exchange, setting.shape, backward, setting.wide_reduce)
        return exchange_loss(setting.machine, setting.exchange, wire, len(there) + len(back))

    def _message_buffers(self, rows: StageRows, keep: bool) -> list[int]:
        """Bytes of all buffers of copy engines that are needed in each pass; those of the exchange in both."""
        setting, heads = self.setting, 0
        if setting.exchange is not None and "ulysses" in setting.machine.engines:
            most = int(self.demand.rows.max(initial=0))
            heads = exchange_message_bytes(setting.exchange, setting.shape, most, setting.wide_reduce)
        keys = [rows.message_bytes(setting.own, backward, keep, setting.wide_reduce) for backward in (False, True)]
        return [message_buffers(heads) + message_buffers(largest * rows.engines) for largest in keys]

    def _wire(self, received: Ints, sent: Ints, row_bytes: float) -> tuple[Floats, Floats]:
        """Seconds of each stage and position, and those that kernels lose: `cost._wire` for all at once."""
        seconds, lost = [], np.zeros((len(received), self.demand.positions))
        for number, link_class in enumerate(CLASSES):
            link = self.setting.machine.links[link_class, "p2p"]
            rows = np.maximum(received[:, number], sent[:, number])
            seconds.append(_linear(rows, link.latency, row_bytes / link.bandwidth))
            lost += rows * (row_bytes * link.disturbance)
        return np.maximum(*seconds), lost

    def _rows(self, distances: list[range]) -> tuple[Ints, Ints]:
        """Key rows received and sent by stage, class of link and position."""
        positions, classes = self.demand.positions, len(CLASSES)
        stage_of = np.zeros(positions, dtype=np.int64)
        for number, span in enumerate(distances):
            stage_of[span.start : span.stop] = number
        reader, holder, rows, distance, link_class = self._remote
        room = (stage_of[distance] * classes + link_class) * positions
        size = len(distances) * classes * positions
        received, sent = (per(room + position, rows, size) for position in (reader, holder))
        shape = len(distances), classes, positions
        return received.reshape(shape), sent.reshape(shape)

    @cached_property
    def _remote(self) -> tuple[Ints, Ints, Ints, Ints, Ints]:
        """What travels: reader, holder, rows, distance on the ring, number of the class of link."""
        positions = self.demand.positions
        nodes = np.arange(positions) * self.setting.ulysses // self.setting.machine.gpus_per_node
        reader, holder, rows = self.demand.traffic
        some = reader != holder
        reader, holder, rows = reader[some], holder[some], rows[some]
        return reader, holder, rows, (holder - reader) % positions, (nodes[reader] != nodes[holder]).astype(np.int64)

    @cached_property
    def _messages(self) -> Ints:
        """Messages that each position sends and receives."""
        reader, holder, *_ = self._remote
        one = np.ones_like(reader)
        return per(reader, one, self.demand.positions) + per(holder, one, self.demand.positions)

    @cached_property
    def _calls(self) -> Ints:
        """Kernel calls of each position, about: one for each kind of block."""
        most = np.zeros(self.demand.positions, dtype=np.int64)
        np.maximum.at(most, self.demand.position, self.demand.ordinal + 1)
        return most

    @cached_property
    def _copied(self) -> Floats:
        """Local key rows that a gather copies beside those that arrive."""
        reader, holder, rows = self.demand.parted.traffic
        return per(reader, rows * (reader == holder), self.demand.positions).astype(np.float64)

    def _kernels(self, table: BlockTable, ordinal: Ints, position: Ints, backward: bool) -> Floats:
        """Seconds of each position's calls; blocks of one position with another ordinal are in another call."""
        positions = self.demand.positions
        most = int(ordinal.max(initial=0)) + 1
        table = replace(table, call=ordinal * positions + position, calls=most * positions)
        seconds = calls_seconds(self.setting.machine, table, self.setting.own, backward)
        return seconds.reshape(most, positions).sum(0)

    @cached_property
    def _gathered(self) -> list[tuple[Floats, Floats]]:
        """Kernels of a gather in both directions: of the pieces that are local, of the others over all their keys."""
        demand = self.demand.parted
        blocks = demand.gathered_blocks
        here, there = demand.local, ~demand.local
        out = []
        for backward in (False, True):
            nobody_else = np.zeros_like(demand.ordinal[here])
            local = self._kernels(blocks.where(here), nobody_else, demand.position[here], backward)
            later = self._kernels(blocks.where(there), demand.ordinal[there], demand.position[there], backward)
            out.append((local, later[None]))
        return out

    @cached_property
    def _own(self) -> tuple[list[Floats], Floats]:
        """Kernels over the keys of the position itself in both directions; and the pairs that each piece has left."""
        blocks, query, key = self.demand.own_blocks
        ordinal, position = (query != key).astype(np.int64), self.demand.position[query]
        seconds = [self._kernels(blocks, ordinal, position, backward) for backward in (False, True)]
        left = self.demand.gathered_blocks.areas - per(query, blocks.areas, len(self.demand.first))
        return seconds, np.maximum(left, 0).astype(np.float64)

    def _staged(self, received: Ints, backward: bool) -> tuple[Floats, Floats]:
        """Kernels and merges of a ring (or of one position): of the local stage, and of each later one.

        The later stages of a position to which rows come are taken as alike but for the rows: each piece over an equal
        share of the pairs that it has left.
        """
        demand, own, machine = self.demand, self.setting.own, self.setting.machine
        seconds, left = self._own
        local, arriving = seconds[backward], received.sum(1)
        stages = np.maximum((arriving > 0).sum(0), 1)
        row_bytes = own.query_heads * (own.head_dim if backward else own.value_dim) * (2 * own.wide + own.itemsize)
        per_row = row_bytes / machine.merge_bandwidth
        some = left > 0
        rows = (demand.last - demand.first)[some]
        keys = np.ceil(left[some] / stages[demand.position[some]] / rows).astype(np.int64)
        open_side = np.full(len(rows), -1)
        table = BlockTable(rows, keys, open_side, open_side, open_side, 1)
        mean = self._kernels(table, demand.ordinal[some], demand.position[some], backward)
        merged = per(demand.position[some], rows, demand.positions)
        mean = mean + _linear(merged, 2 * machine.copy_seconds, per_row)
        later = mean * arriving * stages / np.maximum(arriving.sum(0), 1)
        return local + _linear(demand.cut_rows, 2 * machine.copy_seconds, per_row), later


def _linear(rows: Any, fixed: float, per_row: float) -> Any:
    """`fixed + rows * per_row`, and nothing for nothing."""
    return np.where(rows > 0, fixed + rows * per_row, 0.0)
