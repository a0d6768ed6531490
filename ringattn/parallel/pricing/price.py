"""The price of a schedule: seconds and bytes of all ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from ringattn.parallel.pricing.pass_times import PassTimes
from ringattn.parallel.pricing.timeline import DirectionCost
from ringattn.parallel.schedules.schedule import Schedule


@dataclass(frozen=True)
class Price:
    """A schedule in one direction: what it takes at every position.

    Arguments:
        times: seconds, as arrays over the positions.
        bytes: of buffers, likewise, beside q, k, v, out and their gradients.
        messages: bytes of the message buffers of copy engines, which are there in both passes.
        pair_share: key rows of two buffers at a time over the position's own rows, the largest of all positions.
        kept: bytes of all cast keys, the most of all positions.
        kept_share: the same over q, k, v and out of the position, of which each rank saves its share.
    """

    schedule: Schedule
    times: PassTimes
    bytes: Any
    messages: int
    pair_share: float
    kept: int
    kept_share: float

    @cached_property
    def slowest(self) -> DirectionCost:
        """The position that decides."""
        return self.times.slowest

    @property
    def seconds(self) -> float:
        return self.slowest.seconds


def most_bytes(prices: Sequence[Price]) -> int:
    """What the passes of these prices need at one time, on the rank that needs most."""
    return max(int(np.max(price.bytes, initial=0)) for price in prices) + max(price.messages for price in prices)


def overlapped(a: PassTimes, b: PassTimes) -> DirectionCost:
    """Two attentions of the same ranks in one direction, run so that each computes while the other's keys travel.

    What one waits for is hidden as far as the other's kernels last: an exchange of heads, both ways, under the kernels
    on the ring axis, and their cast under the kernels between the two ways. So far it disturbs them, as any transfer
    beside kernels does. The host issues one after the other. Neighbouring ranks share a position, of as many as each
    ring has.
    """
    ranks = math.lcm(len(a.compute), len(b.compute))
    compute, wire, waiting, lost, host = (
        [np.repeat(getattr(times, field.name), ranks // len(times.compute)) for times in (a, b)]
        for field in fields(PassTimes)
    )
    hidden = [np.minimum(waiting[0], compute[1]), np.minimum(waiting[1], compute[0])]
    exposed = sum(waiting) - sum(hidden)
    disturbance = sum(
        loss * under / np.maximum(all_of, 1e-12) for loss, under, all_of in zip(lost, hidden, waiting, strict=True)
    )
    both = PassTimes(sum(compute) + disturbance, sum(wire), exposed, sum(lost) - disturbance, sum(host))
    return both.slowest
