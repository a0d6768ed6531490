"""The shapes that a run may have where its user left some of it open: degrees of the mesh, and chunks of heads."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ringattn.memory.planning.planner import TIE, Planner, smallest
from ringattn.memory.planning.settled import Settled
from ringattn.memory.planning.shapes import RunShape
from ringattn.parallel.mesh.shape import MeshShape

LONGEST = 1 << 31  # tokens of a pack


@dataclass(frozen=True)
class FreeShape:
    """What of a run's shape is chosen, with the same loss and gradients whatever it comes to.

    Arguments:
        degrees: ring × ulysses, whose product stays.
        chunks: of heads, in which attention is computed.
    """

    degrees: bool = False
    chunks: bool = False


NOTHING_FREE = FreeShape()


@dataclass(frozen=True)
class Ways:
    """A run and all shapes that it may have.

    Arguments:
        asked: the planner of the run as it was asked for; what is free of its shape does not count.
    """

    asked: Planner
    free: FreeShape = NOTHING_FREE

    @property
    def shapes(self) -> list[RunShape]:
        """All of them. Chunks that were asked for stay, so that degrees into which they do not part are left out."""
        return [
            replace(run, head_chunks=chunks)
            for run in self._partings
            for chunks in (self._possible(run) if self.free.chunks or self.free.degrees else (run.head_chunks,))
        ]

    def _possible(self, run: RunShape) -> tuple[int, ...]:
        counts = self.asked.model.head_chunks(run.ulysses)
        return counts if self.free.chunks else tuple(count for count in counts if count == run.head_chunks)

    @property
    def _partings(self) -> list[RunShape]:
        """Of the same ranks; ulysses groups stay on a machine."""
        run, node = self.asked.run, self.asked.machine.gpus_per_node
        if not self.free.degrees:
            return [run]
        size = run.ring * run.ulysses
        pairs = MeshShape(1, size).parted(node if size > node else None)
        heads = self.asked.model.query_heads
        return [replace(run, ring=ring, ulysses=ulysses) for ring, ulysses in pairs if ulysses <= heads]

    @cached_property
    def planners(self) -> tuple[Planner, ...]:
        """One of each shape. The first has as few chunks as there may be, and of such degrees those whose attention and
        recurrences are predicted to be fastest; the others follow by these seconds."""
        planners = [replace(self.asked, run=run) for run in self.shapes]
        if len(planners) == 1:
            return tuple(planners)
        fewest = min(one.run.head_chunks for one in planners)
        return tuple(sorted(planners, key=lambda one: (one.run.head_chunks > fewest, one.mixing_seconds)))

    @property
    def first(self) -> Planner:
        """Of the shape that is taken where it fits."""
        return self.planners[0]

    def fastest(self, fixed: Mapping[str, Any]) -> Settled | None:
        """The fastest settings of the first shape that fit, else those of all shapes; None if nothing fits."""
        first, *others = self.planners
        if (found := first.fastest(fixed)) is not None:
            return found
        fitting: list[Settled] = []
        limit = float("inf")
        for planner in others:
            # Looking at the leanest alone takes a hundredth of the time.
            if planner.leanest(fixed).lacking or (one := planner.fastest(fixed, limit)) is None:
                continue
            fitting.append(one)
            limit = min(limit, one.time.seconds * (1 + TIE))
        return smallest(fitting)

    def leanest(self, fixed: Mapping[str, Any]) -> Settled:
        """One that fits if any does, else the one that lacks least on the GPU."""
        ways: list[Settled] = []
        for planner in self.planners:
            ways.append(planner.leanest(fixed))
            if not ways[-1].lacking:
                return ways[-1]
        return min(ways, key=lambda way: way.alive.peak().total)

    def longest(self, fixed: Mapping[str, Any]) -> int:
        """The most tokens of a pack that fit in any shape; see `choice.longest`."""
        search, step = _Search(self, fixed), 1024 * self.asked.run.ring * self.asked.run.ulysses
        if not search.fits(step):
            return 0
        low, high = 1, 2
        while high * step < LONGEST and search.fits(high * step):
            low, high = high, 2 * high
        high = min(high, LONGEST // step)
        while high - low > max(1, low // 128):  # to a percent
            middle = (low + high) // 2
            low, high = (middle, high) if search.fits(middle * step) else (low, middle)
        return low * step


class _Search:
    """Whether lengths fit in any shape, each shape asked as seldom as can be: none that did not fit fewer tokens."""

    def __init__(self, ways: Ways, fixed: Mapping[str, Any]) -> None:
        self.asked, self.fixed = ways.asked, fixed
        # Those with more chunks come first, as they hold less; then whichever fitted last.
        self.shapes = sorted(ways.shapes, key=lambda run: -run.head_chunks)
        self.failed: dict[RunShape, int] = {}

    def fits(self, tokens: int) -> bool:
        for number, shape in enumerate(self.shapes):
            if self.failed.get(shape, tokens + 1) <= tokens:
                continue
            run = replace(shape, tokens=tokens, lengths=())
            if not replace(self.asked, run=run).leanest(self.fixed).lacking:
                self.shapes.insert(0, self.shapes.pop(number))
                return True
            self.failed[shape] = tokens
        return False
