"""What a schedule costs all ring positions, in closed forms, without building their plans.

What positions need of one another is counted exactly; inside the later stages of a ring the work of a position is
spread in proportion to the rows that arrive.
"""

import itertools
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ringattn.parallel.cost import (
    CLASSES,
    DirectionCost,
    Machine,
    StageCost,
    backward_timeline,
    calls_seconds,
    exchange_seconds,
    forward_timeline,
)
from ringattn.parallel.demand import Demand, per
from ringattn.parallel.plan import Exchange, Shape, StageRows, largest_pair
from ringattn.parallel.rates import BlockTable, Floats, Ints


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
    """

    machine: Machine
    shape: Shape
    exchange: Exchange | None = None
    keep_keys: bool = False
    wide_reduce: bool = True
    primitive: str = "p2p"

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

    `pair_share` are the key rows of two buffers at a time over the position's own rows, the largest of all positions.
    """

    candidate: Candidate
    compute: Floats
    wire: Floats
    exposed: Floats
    bytes: Any
    pair_share: float

    @property
    def slowest(self) -> DirectionCost:
        """The position that decides."""
        at = int(np.argmax(self.compute + self.exposed))
        return DirectionCost(float(self.compute[at]), float(self.wire[at]), float(self.exposed[at]))

    @property
    def seconds(self) -> float:
        return self.slowest.seconds

    @property
    def most_bytes(self) -> int:
        return int(np.max(self.bytes, initial=0))


@dataclass(frozen=True)
class Pricer:
    """Prices of candidates in one direction; what they share is computed once."""

    demand: Demand
    setting: Setting
    backward: bool

    def price(self, candidate: Candidate) -> Price:
        demand, setting = self.demand, self.setting
        received, sent = self._rows(candidate.distances(demand.positions))
        gather = candidate.schedule == "gather"
        copied = self._copied if gather else np.zeros(demand.positions)
        compute = list(self._gathered) if gather else self._staged(received.sum(1))
        stages = [StageCost(compute[0])]
        for number, seconds in enumerate(compute[1:]):
            stages.append(self._stage(seconds, received[number], sent[number], copied))
        wire, copies = exchange_seconds(
            setting.machine, setting.exchange, 0, setting.shape, self.backward, setting.wide_reduce
        )
        buffers = [rows.sum(0) + copied for rows in received]
        shared_q = demand.cut_rows if candidate.schedule == "ring" else 0
        rows = StageRows(buffers, [rows.sum(0) for rows in sent], shared_q, demand.cut_rows if buffers else 0)
        zero = np.zeros(demand.positions)
        return Price(
            candidate,
            compute=zero + sum(stage.compute for stage in stages) + copies,
            wire=zero + sum(stage.cast + stage.reduce for stage in stages) + wire,
            exposed=zero + (backward_timeline if self.backward else forward_timeline)(stages) + wire,
            bytes=zero + self._bytes(rows),
            pair_share=float(np.max(largest_pair(buffers) / np.maximum(demand.rows, 1), initial=0.0)),
        )

    def _bytes(self, rows: StageRows) -> Any:
        setting = self.setting
        if self.backward:
            return rows.backward_bytes(setting.own, setting.keep_keys, setting.wide_reduce)
        return rows.forward_bytes(setting.own, setting.keep_keys)

    def _stage(self, seconds: Floats, received: Ints, sent: Ints, copied: Floats) -> StageCost:
        """One later stage: its kernels' seconds, rows received and sent by class of link, and local rows copied."""
        machine, own = self.setting.machine, self.setting.own
        row, cast, reduce = own.key_row_bytes, 0.0, 0.0
        if not (self.backward and self.setting.keep_keys):
            cast = self._wire(received, sent, row)
            seconds = seconds + _linear(copied, 2 * machine.copy_seconds, 2 * row / machine.copy_bandwidth)
        if self.backward:
            reduce = self._wire(received, sent, row * (4 / own.itemsize if self.setting.wide_reduce else 1))
            rows = received.sum(0) + sent.sum(0) + 2 * copied
            per_row = row * (1 + 8 / own.itemsize) / machine.merge_bandwidth
            seconds = seconds + _linear(rows, 4 * machine.copy_seconds, per_row)
        return StageCost(seconds, cast, reduce)

    def _wire(self, received: Ints, sent: Ints, row_bytes: float) -> Any:
        """Both directions and both classes of link at the same time: (2, P) rows each."""
        seconds = []
        for number, link_class in enumerate(CLASSES):
            link = self.setting.machine.links[link_class, self.setting.primitive]
            rows = np.maximum(received[number], sent[number])
            seconds.append(_linear(rows, link.latency, row_bytes / link.bandwidth))
        return np.maximum(*seconds)

    def _rows(self, distances: list[range]) -> tuple[Ints, Ints]:
        """Key rows received and sent by stage, class of link and position: (stages, 2, P) each."""
        positions = self.demand.positions
        reader, holder, rows = self.demand.traffic
        stage_of = np.zeros(positions, dtype=np.int64)
        for number, span in enumerate(distances):
            stage_of[span.start : span.stop] = number
        nodes = np.arange(positions) * self.setting.ulysses // self.setting.machine.gpus_per_node
        remote = reader != holder
        reader, holder, rows = reader[remote], holder[remote], rows[remote]
        room = stage_of[(holder - reader) % positions] * 2 + (nodes[reader] != nodes[holder])
        shape = len(distances), len(CLASSES), positions
        received, sent = (
            per(room * positions + position, rows, len(distances) * len(CLASSES) * positions).reshape(shape)
            for position in (reader, holder)
        )
        return received, sent

    @cached_property
    def _copied(self) -> Floats:
        """Local key rows that a gather copies beside those that arrive."""
        reader, holder, rows = self.demand.traffic
        return per(reader, rows * (reader == holder), self.demand.positions).astype(np.float64)

    def _kernels(self, table: BlockTable, ordinal: Ints, position: Ints) -> Floats:
        """Seconds of each position's calls; blocks of one position with another ordinal are in another call."""
        positions = self.demand.positions
        most = int(ordinal.max(initial=0)) + 1
        table = replace(table, call=ordinal * positions + position, calls=most * positions)
        seconds = calls_seconds(self.setting.machine, table, self.setting.own, self.backward)
        return seconds.reshape(most, positions).sum(0)

    @cached_property
    def _gathered(self) -> tuple[Floats, Floats]:
        """Kernels of a gather: of the pieces that are local, and of the others over all their keys."""
        demand, blocks = self.demand, self.demand.gathered_blocks
        parts = []
        for mask, ordinal in ((demand.local, np.zeros_like(demand.ordinal)), (~demand.local, demand.ordinal)):
            parts.append(self._kernels(blocks.where(mask), ordinal[mask], demand.position[mask]))
        return (parts[0], parts[1]) if demand.positions > 1 else (parts[0], parts[1][:0])

    @cached_property
    def _own(self) -> tuple[Floats, Floats]:
        """Kernels over the keys of the position itself; and what each piece has left, in pairs."""
        blocks, query, key = self.demand.own_blocks
        seconds = self._kernels(blocks, (query != key).astype(np.int64), self.demand.position[query])
        left = self.demand.gathered_blocks.areas - per(query, blocks.areas, len(self.demand.first))
        return seconds, np.maximum(left, 0).astype(np.float64)

    def _staged(self, received: Ints) -> list[Floats]:
        """Kernels and merges of a ring (or of one position): of the local stage, then of those after it."""
        demand, own, machine = self.demand, self.setting.own, self.setting.machine
        local, left = self._own
        if not len(received):
            return [local]
        dim = own.head_dim if self.backward else own.value_dim
        per_row = own.query_heads * dim * (8 + own.itemsize) / machine.merge_bandwidth
        merge = _linear(demand.cut_rows, 2 * machine.copy_seconds, per_row)
        stages = [local + merge]
        total = np.maximum(received.sum(0), 1)
        rows = demand.last - demand.first
        for arriving in received:
            share = (arriving / total)[demand.position]
            keys = np.ceil(left * share / rows).astype(np.int64)
            some = keys > 0
            count = int(some.sum())
            open_side = np.full(count, -1)
            table = BlockTable(rows[some], keys[some], open_side, open_side, open_side, 1)
            seconds = self._kernels(table, demand.ordinal[some], demand.position[some])
            merged = per(demand.position[some], rows[some], demand.positions)
            stages.append(seconds + _linear(merged, 2 * machine.copy_seconds, per_row))
        return stages


def _linear(rows: Any, fixed: float, per_row: float) -> Any:
    """`fixed + rows * per_row`, and nothing for nothing."""
    return np.where(rows > 0, fixed + rows * per_row, 0.0)
