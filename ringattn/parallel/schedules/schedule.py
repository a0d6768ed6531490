"""A schedule: how the keys of a placement move."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ringattn.mask import Band
from ringattn.parallel.plan.plan import AttentionPlan
from ringattn.parallel.schedules.demand import KeyDemand
from ringattn.parallel.schedules.segment_demand import SegmentDemand
from ringattn.parallel.schedules.stage_work import AllPositions, Passes, StageWork


@dataclass(frozen=True)
class Schedule(ABC):
    """A way to move keys on the ring axis. It plans the stages of a position, and says what they are for all positions;
    who prices, chooses or executes knows no more of it.

    `kind` is its name in `scheme=`, in plans and in reasons; `segments` says whether it also plans documents that have
    some, for which it is given a `SegmentDemand`.
    """

    kind: ClassVar[str]
    segments: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """As reasons tell it."""
        return self.kind

    @classmethod
    def named(cls, stages: int | None) -> "Schedule":
        """The one that `scheme=kind` asks for; `stages` is an option of a ring."""
        return cls()

    @classmethod
    def considered(cls, ring: int) -> "Sequence[Schedule]":
        """Those that scheme="auto" chooses from on so many positions."""
        return [cls()]

    def suits(self, band: Band) -> bool:
        """Whether scheme="auto" should consider it for a mask."""
        return True

    @abstractmethod
    def plan(self, demand: KeyDemand | SegmentDemand, position: int) -> AttentionPlan:
        """The stages of a ring position, without an exchange. Pure integers: every rank plans its own, and what one
        expects to receive is what the others plan to send."""

    def passes(self, every: AllPositions) -> Passes:
        """What both passes compute and move at all positions.

        Exactly, by planning them all, which is slow for hundreds of positions: so schedules that are often considered
        count instead.
        """
        plans = [self.plan(every.demand, position) for position in range(every.demand.positions)]
        plans = [replace(plan, exchange=every.exchange) for plan in plans]
        forward, backward = (
            StageWork.stacked([StageWork.of(plan, every.machine, every.own, backward) for plan in plans])
            for backward in (False, True)
        )
        return forward, backward
