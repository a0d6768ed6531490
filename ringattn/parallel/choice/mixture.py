"""Which documents of a stream to exchange and which to leave on the ring axis, by predicted time. Pure.

Long documents are the ones to exchange: on the ring axis they would be cut, and an exchange costs the same per token
whatever the document. Short ones need nothing from elsewhere where they stay whole. So the documents are sorted by
length and the longest n of them exchanged; that n is left to find.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import numpy as np

from ringattn.documents import Documents
from ringattn.mask import Mask
from ringattn.parallel.choice.schedule import PAIR_SHARE
from ringattn.parallel.geometry.block_table import Floats
from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.mesh.shape import MeshShape
from ringattn.parallel.placement.load import Load
from ringattn.parallel.placement.parts import Parts
from ringattn.parallel.placement.placement import Placement
from ringattn.parallel.plan.exchange import Exchange, exchange_plan
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.pricing.exchange_times import exchange_times
from ringattn.parallel.pricing.pass_times import host_seconds
from ringattn.parallel.pricing.price import Price, overlapped
from ringattn.parallel.pricing.pricer import Pricer
from ringattn.parallel.pricing.setting import PriceInputs
from ringattn.parallel.schedules.candidates import candidates

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # documents to exchange; and up to where a length ends
BORDERS = 8
PRICED = 4  # of them the most promising


@dataclass(frozen=True)
class Mixture:
    """Placements of different documents and their predicted seconds, forward and backward of all masks."""

    parts: tuple[Placement, ...]
    seconds: float


@dataclass(frozen=True)
class Mixer:
    """Prices mixtures of one stream.

    Arguments:
        inner, outer: the mesh of the documents that are exchanged, and of the others.
        parted: the placements of these parts.
        masks: with the number of layers that each has.
        machine: whose speed is predicted; None: each mesh's own.
    """

    docs: Documents
    inner: MeshShape
    outer: MeshShape
    parted: Callable[[Parts], tuple[Placement, ...]]
    masks: Sequence[tuple[Mask, float]]
    shape: Shape
    machine: Machine | None

    def best(self, limit: float) -> Mixture | None:
        """The fastest of those that were priced, if it takes less than `limit` seconds."""
        found: Mixture | None = None
        order = sorted(range(len(self.docs)), key=lambda number: -self.docs.lengths[number])
        bounds = self._bounds([self.docs.lengths[number] for number in order])
        # Of equally promising ones the largest: then the fewest long documents are cut.
        for bound, count in sorted(bounds, key=lambda pair: (pair[0], -pair[1]))[:PRICED]:
            if bound >= limit:
                break
            parts = self.parted([(_degrees(self.inner), order[:count]), (_degrees(self.outer), order[count:])])
            seconds = self.seconds(parts)
            if seconds < limit:
                found, limit = Mixture(parts, seconds), seconds
        return found

    def seconds(self, parts: tuple[Placement, ...]) -> float:
        """Both parts at once; keys on the ring axis are gathered."""
        total = 0.0
        for mask, layers in self.masks:
            exchanged, others = (self._prices(part, mask) for part in parts)
            if max(price.pair_share for price in (*exchanged, *others)) > PAIR_SHARE:
                return float("inf")  # the keys would be too many to gather
            total += layers * sum(overlapped(a.times, b.times).seconds for a, b in zip(exchanged, others, strict=True))
        return total

    def _prices(self, part: Placement, mask: Mask) -> tuple[Price, Price]:
        setting = PriceInputs(part.mesh.planned_for(self.machine), self.shape)
        (schedule,) = candidates(part.mesh.ring, "gather", None)
        return Pricer.of(part, mask, setting).price(schedule)

    def _bounds(self, lengths: Sequence[int]) -> Iterator[tuple[float, int]]:
        """Numbers of documents to exchange, each with seconds that no mixture of so many takes less than.

        The kernels of the whole stream in even shares, and what the exchange lasts longer than those of the documents
        that are not exchanged; or what the host takes to issue two attentions.
        """
        kernels = [self._even_seconds(lengths, backward) for backward in (False, True)]
        tokens = [0, *accumulate(lengths)]
        layers = sum(layers for _, layers in self.masks)
        for count in _counts(lengths):
            bound = 0.0
            for backward, seconds in enumerate(kernels):
                wire = layers * self._wire(tokens[count], bool(backward))
                host = layers * _least_host(self.inner.planned_for(self.machine), bool(backward))
                bound += max(seconds.sum() + max(0.0, wire - seconds[count:].sum()), host)
            yield bound, count

    def _even_seconds(self, lengths: Sequence[int], backward: bool) -> Floats:
        """A rank's share of the kernels of each document, all masks together."""
        dims = self.shape.head_dim + self.shape.value_dim
        rate = self.outer.planned_for(self.machine).rate(self.shape.head_dim, backward)
        load = Load(tuple(self.masks), (rate,), dims)
        return load.costs(np.array(lengths, dtype=np.int64)) * self.shape.query_heads / self.outer.sequence_size

    @cached_property
    def _exchange(self) -> Exchange:
        """How heads are dealt in an exchange, of no rows."""
        return exchange_plan(((0, 0),) * self.inner.ulysses, self.shape.query_heads, self.shape.key_heads, 0)

    def _wire(self, tokens: int, backward: bool) -> float:
        """Seconds of the exchange of so many tokens."""
        ranks, rows = self.inner.ulysses, tokens // self.inner.ring
        deal = tuple((rank * rows // ranks, (rank + 1) * rows // ranks) for rank in range(ranks))
        exchange = replace(self._exchange, rows=deal)
        return exchange_times(self.inner.planned_for(self.machine), exchange, 0, self.shape, backward).wire


def _counts(lengths: Sequence[int]) -> list[int]:
    """Numbers of the longest documents to consider, of lengths in descending order; some are left."""
    borders = [count for count in range(1, len(lengths)) if lengths[count - 1] > lengths[count]]
    found = {*(count for count in COUNTS if count < len(lengths)), *borders[:BORDERS]}
    return sorted(count for count in found if lengths[count])


def _least_host(machine: Machine, backward: bool) -> float:
    """An exchange around one call, and one call."""
    return sum(
        host_seconds(machine, calls=1, casts=0, reduces=0, exchanged=exchanged, messages=0, backward=backward)
        for exchanged in (True, False)
    )


def _degrees(mesh: MeshShape) -> tuple[int, int]:
    return mesh.ring, mesh.ulysses
