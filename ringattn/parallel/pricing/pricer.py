"""What a schedule costs all ring positions, without their plans (`schedules/stage_work.py` says what is estimated)."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ringattn.kept import kept
from ringattn.mask import Mask
from ringattn.parallel.placement.pieces import PieceTable
from ringattn.parallel.placement.placement import Placement
from ringattn.parallel.pricing.exchange_times import ExchangeTimes, exchange_times
from ringattn.parallel.pricing.memory import StageRows, exchange_bytes, exchange_message_bytes
from ringattn.parallel.pricing.pass_times import pass_times
from ringattn.parallel.pricing.price import Price
from ringattn.parallel.pricing.setting import PriceInputs
from ringattn.parallel.schedules.demand import KeyDemand
from ringattn.parallel.schedules.schedule import Schedule
from ringattn.parallel.schedules.segment_demand import SegmentDemand
from ringattn.parallel.schedules.stage_work import AllPositions, StageWork
from ringattn.parallel.transport.buffers import message_buffers


@dataclass(frozen=True)
class Pricer:
    """Prices of schedules; what they share is computed once."""

    demand: KeyDemand | SegmentDemand
    setting: PriceInputs

    @classmethod
    def of(cls, placement: Placement, mask: Mask, setting: PriceInputs) -> "Pricer":
        """Kept with the placement: degrees, and then plans, are chosen by the same prices."""
        choices = setting.keep_keys, setting.wide_reduce, setting.head_chunks
        key = ("prices", mask, setting.machine.digest, setting.shape, choices)
        return kept(placement, key, lambda: cls(_demand(placement, mask), setting.on(placement)))

    def price(self, schedule: Schedule, keep_keys: bool | None = None) -> tuple[Price, Price]:
        """The prices of the forward and of the backward pass.

        Arguments:
            keep_keys: keep cast keys for the backward pass; None: as the setting says, and not if that is open.
        """
        keep = bool(self.setting.keep_keys if keep_keys is None else keep_keys)
        return kept(self, (schedule, keep), lambda: self._price(schedule, keep))

    @cached_property
    def positions(self) -> AllPositions:
        """What schedules count on."""
        return AllPositions(self.demand, self.setting.machine, self.setting.own, self.setting.exchange)

    def _price(self, schedule: Schedule, keep: bool) -> tuple[Price, Price]:
        works = kept(self, schedule, lambda: schedule.passes(self.positions))
        setting, rows = self.setting, self._stage_rows(works[0])
        tokens, share = self.demand.rows, setting.share
        pair_share = float(np.max(rows.largest_pair / np.maximum(tokens, 1), initial=0.0))
        # A buffer with all keys is kept in place of the position's own, where no local call reads those.
        in_place = np.where(works[0].calls[0] == 0, tokens, 0)
        all_kept = np.maximum(rows.buffers.sum(0) - in_place, 0) * share.key_row_bytes
        kept_share = float(np.max(all_kept / np.maximum(tokens * share.row_bytes, 1), initial=0.0))
        sizes = rows.forward_bytes(setting.own, keep), rows.backward_bytes(setting.own, keep, setting.wide_reduce)
        forward, backward = (
            Price(
                schedule,
                pass_times(setting.machine, work, exchanged, setting.head_chunks, keep, setting.wide_reduce),
                bytes=size + self._exchange_bytes,
                messages=self._message_buffers(rows, work.backward, keep),
                pair_share=pair_share,
                kept=int(np.max(all_kept, initial=0)),
                kept_share=kept_share,
            )
            for work, exchanged, size in zip(works, self._exchanged, sizes, strict=True)
        )
        return forward, backward

    def _stage_rows(self, work: StageWork) -> StageRows:
        setting, shared_k = self.setting, work.shared_k
        if setting.exchange is not None and setting.exchange.copied_keys and setting.wide_reduce:
            shared_k = 2 * self.demand.rows  # as of a plan that sums copies
        return StageRows(
            buffers=work.buffers[1:],
            received=work.moved.received_rows[1:],
            sent=work.moved.sent_rows[1:],
            shared_q=work.shared_q,
            shared_k=shared_k,
            most_sent=int(work.moved.most_sent.max(initial=0)),
            most_returned=int(work.moved.most_returned.max(initial=0)),
            engines="ring" in setting.machine.engines,
            chunks=setting.head_chunks,
        )

    @cached_property
    def _exchanged(self) -> list[ExchangeTimes]:
        """The exchange of heads in both directions."""
        setting = self.setting
        return [
            exchange_times(setting.machine, setting.exchange, 0, setting.shape, backward, setting.wide_reduce)
            for backward in (False, True)
        ]

    @cached_property
    def _exchange_bytes(self) -> Any:
        """What an exchange holds at every position."""
        setting, tokens = self.setting, self.demand.rows
        if setting.exchange is None:
            return 0
        return exchange_bytes(setting.shape, setting.share, tokens, -(-tokens // setting.ulysses))

    def _message_buffers(self, rows: StageRows, backward: bool, keep: bool) -> int:
        """Bytes of all buffers of copy engines that are needed in a pass; those of the exchange in both."""
        setting, heads = self.setting, 0
        if setting.exchange is not None and "ulysses" in setting.machine.engines:
            most = int(self.demand.rows.max(initial=0))
            heads = exchange_message_bytes(setting.exchange, setting.shape, most, setting.wide_reduce)
        keys = rows.message_bytes(setting.own, backward, keep, setting.wide_reduce)
        return message_buffers(heads) + message_buffers(keys * rows.engines)


def _demand(placement: Placement, mask: Mask) -> KeyDemand | SegmentDemand:
    if placement.docs.segmented:
        return kept(placement, ("demand", mask), lambda: SegmentDemand.of(placement, mask))
    return kept(placement, ("demand", mask), lambda: KeyDemand.of(PieceTable.of(placement, mask), mask.band))
