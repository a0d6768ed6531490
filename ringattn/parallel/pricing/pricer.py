"""What a schedule costs all ring positions, in closed forms, without building their plans.

What positions need of one another is counted exactly; what kernels take is `kernel_times`' business.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ringattn.kept import kept
from ringattn.mask import Mask
from ringattn.parallel.geometry.block_table import Floats, Ints
from ringattn.parallel.machine.machine import CLASSES
from ringattn.parallel.placement.pieces import PieceTable
from ringattn.parallel.placement.placement import Placement
from ringattn.parallel.plan.messages import exchange_messages
from ringattn.parallel.pricing.kernel_times import Kernels, KernelTimes, linear
from ringattn.parallel.pricing.memory import StageRows, exchange_bytes, exchange_message_bytes
from ringattn.parallel.pricing.plan_cost import host_seconds
from ringattn.parallel.pricing.price import Price
from ringattn.parallel.pricing.setting import PriceInputs
from ringattn.parallel.pricing.timeline import StageCost, backward_timeline, disturbed, forward_timeline
from ringattn.parallel.pricing.wire import exchange_loss, exchange_seconds, pulls
from ringattn.parallel.schedules.demand import KeyDemand, per
from ringattn.parallel.schedules.schedule import Schedule
from ringattn.parallel.transport.buffers import message_buffers


class _Wire(NamedTuple):
    """Seconds of each stage and position beside kernels, those that kernels lose by it, and those of what is pulled."""

    seconds: Floats
    lost: Floats
    pulled: Floats


@dataclass(frozen=True)
class _Moved:
    """What a schedule computes and moves, whether its keys are kept or not; arrays are (stages, position).

    Arguments:
        received, sent: key rows.
        copied: key rows of each position that it copies beside those that arrive.
        cast, reduce: on the wire.
        cast_copies: seconds of copies around the cast.
        calls: of the kernel, (position).
    """

    received: Ints
    sent: Ints
    copied: Floats
    kernels: Kernels
    cast: "_Wire"
    reduce: "_Wire"
    cast_copies: Floats
    calls: Ints


def _demand(placement: Placement, mask: Mask) -> KeyDemand:
    return kept(placement, ("demand", mask), lambda: KeyDemand.of(PieceTable.of(placement, mask), mask.band))


@dataclass(frozen=True)
class Pricer:
    """Prices of candidates; what they share is computed once."""

    demand: KeyDemand
    setting: PriceInputs

    @classmethod
    def of(cls, placement: Placement, mask: Mask, setting: PriceInputs) -> "Pricer":
        """Kept with the placement: degrees, and then plans, are chosen by the same prices."""
        choices = setting.keep_keys, setting.wide_reduce, setting.head_chunks
        key = ("prices", mask, setting.machine.digest, setting.shape, choices)
        return kept(placement, key, lambda: cls(_demand(placement, mask), setting.on(placement)))

    def price(self, schedule: Schedule, keep_keys: bool | None = None) -> tuple[Price, Price]:
        """Of the forward and of the backward pass; with keys kept if the setting says so, or what is said here."""
        if schedule.kind == "joint" and not self.demand.joined:
            return self._joint.price(schedule, keep_keys)
        keep = bool(self.setting.keep_keys if keep_keys is None else keep_keys)
        return kept(self, (schedule, keep), lambda: self._price(schedule, keep))

    @cached_property
    def _joint(self) -> "Pricer":
        return Pricer(self.demand.joint, self.setting)

    def _price(self, schedule: Schedule, keep: bool) -> tuple[Price, Price]:
        moved, setting, demand = kept(self, schedule, lambda: self._moved(schedule)), self.setting, self.demand
        own = setting.own
        summed = demand.parted.summed_rows if schedule.gathers else demand.cut_rows * bool(len(moved.received))
        if setting.exchange is not None and setting.exchange.copied_keys and setting.wide_reduce:
            summed = 2 * demand.rows  # as of a plan that sums copies
        rows = StageRows(
            buffers=moved.received + moved.copied,
            received=moved.received,
            sent=moved.sent,
            shared_q=0 if schedule.gathers else demand.cut_rows * bool(len(moved.received)),
            shared_k=summed,
            most_sent=int(moved.sent.max(initial=0)),
            most_returned=int(moved.received.max(initial=0)),
            engines="ring" in setting.machine.engines,
            chunks=setting.head_chunks,
        )
        pair_share = float(np.max(rows.largest_pair / np.maximum(demand.rows, 1), initial=0.0))
        # A buffer with all keys is kept in place of the position's own.
        share = setting.share
        all_kept = np.maximum(rows.buffers.sum(0) - demand.rows * demand.joined, 0) * share.key_row_bytes
        kept_share = float(np.max(all_kept / np.maximum(demand.rows * share.row_bytes, 1), initial=0.0))
        exchanged = 0
        if setting.exchange is not None:
            exchanged = exchange_bytes(setting.shape, share, demand.rows, -(-demand.rows // setting.ulysses))
        sizes = rows.forward_bytes(own, keep), rows.backward_bytes(own, keep, setting.wide_reduce)
        forward, backward = (
            Price(
                schedule,
                *self._times(moved, bool(direction), keep),
                bytes=size + exchanged,
                messages=messages,
                pair_share=pair_share,
                kept=int(np.max(all_kept, initial=0)),
                kept_share=kept_share,
            )
            for direction, (size, messages) in enumerate(zip(sizes, self._message_buffers(rows, keep), strict=True))
        )
        return forward, backward

    def _times(self, moved: _Moved, backward: bool, keep: bool) -> tuple[Floats, Floats, Floats, Floats, Floats]:
        """Of one pass: seconds of compute, of wire, of waiting for it, lost beside it, and of the host."""
        setting, machine, own = self.setting, self.setting.machine, self.setting.own
        local, later = moved.kernels[backward]
        none = np.zeros(later.shape)
        cast = reduce = _Wire(none, none, none)
        if not (backward and keep):
            cast = moved.cast
            later = later + moved.cast_copies
        if backward:
            reduce = moved.reduce
            rows = 2 * moved.received + 3 * moved.sent + 3 * moved.copied
            later = later + linear(rows, 2 * machine.copy_seconds, own.wide_key_row_bytes / machine.merge_bandwidth)
        stages = [StageCost(local)]
        stages += [
            StageCost(seconds, there, back, lost=more)
            for seconds, there, back, more in zip(
                later, cast.seconds, reduce.seconds, cast.lost + reduce.lost, strict=True
            )
        ]
        chunks = setting.head_chunks
        exposed = (backward_timeline if backward else forward_timeline)(stages, chunks) + np.zeros(len(local))
        wire, copies = self._exchange[backward]
        disturbance = disturbed(stages * chunks, exposed)
        pulled = chunks * (cast.pulled + reduce.pulled).sum(0)
        compute = chunks * (local + later.sum(0)) + disturbance + copies
        host = host_seconds(
            machine,
            calls=chunks * moved.calls,
            casts=0 if backward and keep else chunks * len(later),
            reduces=chunks * len(later) if backward else 0,
            exchanged=setting.exchange is not None,
            messages=chunks * self._messages,
            backward=backward,
        )
        more = chunks * sum(stage.lost for stage in stages) - disturbance + self._exchange_loss(wire, backward)
        travels = chunks * (cast.seconds + reduce.seconds).sum(0) + pulled
        return compute, travels + wire, exposed + pulled + wire, more, host

    def _moved(self, schedule: Schedule) -> _Moved:
        setting, machine, own = self.setting, self.setting.machine, self.setting.own
        by_class = self._rows(schedule.distances(self.demand.positions))
        received, sent = (rows.sum(1) for rows in by_class)
        copied = self._copied if schedule.gathers else np.zeros(self.demand.positions)
        packed = received + sent + copied
        returned_bytes = own.wide_key_row_bytes if setting.wide_reduce else own.key_row_bytes
        return _Moved(
            received,
            sent,
            copied,
            kernels=self._kernels.gathered if schedule.gathers else self._kernels.staged(received),
            cast=self._wire(*by_class, own.key_row_bytes, sent.max(1, initial=0)),
            reduce=self._wire(*by_class, returned_bytes, received.max(1, initial=0)),
            cast_copies=linear(packed, 2 * machine.copy_seconds, 2 * own.key_row_bytes / machine.copy_bandwidth),
            calls=self.demand.parted.gathered_calls if schedule.gathers else self._calls + (len(received) > 0),
        )

    @cached_property
    def _kernels(self) -> KernelTimes:
        return KernelTimes(self.demand, self.setting.machine, self.setting.own)

    @cached_property
    def _exchange(self) -> list[tuple[float, float]]:
        """Wire and copies of the exchange of heads in both directions."""
        setting = self.setting
        return [
            exchange_seconds(setting.machine, setting.exchange, 0, setting.shape, backward, setting.wide_reduce)
            for backward in (False, True)
        ]

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

    def _wire(self, received: Ints, sent: Ints, row_bytes: float, most: Ints) -> _Wire:
        """`cost._wire` for all at once.

        Arguments:
            received, sent: (stages, class of link, position) rows.
            most: (stages) rows that any position sends.
        """
        links = [self.setting.machine.links[link_class, "p2p"] for link_class in CLASSES]
        latency, per_row, lost_per_row = np.array(
            [(link.latency, row_bytes / link.bandwidth, row_bytes * link.disturbance) for link in links]
        ).T[:, :, None]
        rows = np.maximum(received, sent)
        seconds, pulled = linear(rows, latency, per_row).max(1), pulls(self.setting.machine, most * row_bytes)[:, None]
        return _Wire(seconds * ~pulled, (rows * lost_per_row).sum(1) * ~pulled, seconds * pulled)

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
        """Key rows that a gather copies beside those that arrive."""
        return self.demand.parted.copied_rows.astype(np.float64)
