"""The price of a schedule: seconds and bytes of all ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ringattn.parallel.geometry.block_table import Floats
from ringattn.parallel.pricing.timeline import DirectionCost
from ringattn.parallel.schedules.schedule import Schedule


@dataclass(frozen=True)
class Price:
    """A schedule in one direction, for every position as arrays: seconds of compute, wire and waiting, and bytes.

    Arguments:
        waiting: of kernels, for transfers.
        lost: that kernels would lose, were all that is waited for to travel beside them.
        host: that it takes to issue everything.
        pair_share: key rows of two buffers at a time over the position's own rows, the largest of all positions.
        messages: bytes of the message buffers of copy engines, which are there in both passes.
        kept: bytes of all cast keys, the most of all positions.
        kept_share: the same over q, k, v and out of the position, of which each rank saves its share.
    """

    schedule: Schedule
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
