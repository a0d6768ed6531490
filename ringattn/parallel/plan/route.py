"""Which rows go from whom to whom."""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

from ringattn.kept import kept
from ringattn.kernels.spec import Range
from ringattn.parallel.geometry.ranges import length


@dataclass(frozen=True)
class Route:
    """One all-to-all over an axis as one rank sees it: messages end to end, in the order of ranks; in rows or elements.

    Arguments:
        sends, receives: the size of the message for, and from, every rank.
        there: where this rank's message begins in what each rank sends.
        most: what the rank sends that sends most: 0 if nobody does.
    """

    sends: tuple[int, ...] = ()
    receives: tuple[int, ...] = ()
    there: tuple[int, ...] = ()
    most: int = 0

    @cached_property
    def sent(self) -> int:
        return sum(self.sends)

    @cached_property
    def received(self) -> int:
        return sum(self.receives)

    @cached_property
    def begins(self) -> tuple[int, ...]:
        """Where the message from every rank begins in what is received."""
        return tuple(itertools.accumulate(self.receives, initial=0))[:-1]

    @cached_property
    def grain(self) -> int:
        """What all sizes and places are multiples of; another number on other ranks."""
        return math.gcd(*self.sends, *self.receives, *self.there)

    def times(self, width: int) -> "Route":
        """The same with rows of `width` elements; made once."""
        return kept(self, ("times", width), lambda: self._times(width))

    def _times(self, width: int) -> "Route":
        parts = (self.sends, self.receives, self.there)
        sends, receives, there = (tuple(width * size for size in part) for part in parts)
        return Route(sends, receives, there, width * self.most)


@dataclass(frozen=True)
class Message:
    """Key rows for (or from) one ring rank: the rows of `ranges`, end to end."""

    peer: int
    ranges: tuple[Range, ...]

    @property
    def rows(self) -> int:
        return length(self.ranges)
