"""A schedule: how the keys of a placement move."""

import itertools
from dataclasses import dataclass

from ringattn.parallel.placement.pieces import PieceTable
from ringattn.parallel.plan.plan import AttentionPlan
from ringattn.parallel.schedules.demand import KeyDemand
from ringattn.parallel.schedules.gather import plan_gather, plan_joint
from ringattn.parallel.schedules.ring import plan_ring


@dataclass(frozen=True)
class Schedule:
    """A way to move keys on the ring axis: "local", "gather" (one later stage), "joint" (the same with all work in it),
    or "ring" with `stages` in all."""

    kind: str
    stages: int

    @property
    def name(self) -> str:
        return f"ring of {self.stages} stages" if self.kind == "ring" else self.kind

    @property
    def gathers(self) -> bool:
        """Whether each query row is computed once, over all its keys."""
        return self.kind in ("gather", "joint")

    def distances(self, ring: int) -> list[range]:
        """For each later stage, how far away on the ring its keys come from."""
        casts = min(ring - 1, self.stages - 1)
        if casts < 1:
            return []
        bounds = [1 + index * (ring - 1) // casts for index in range(casts + 1)]
        return [range(a, b) for a, b in itertools.pairwise(bounds)]


RING_STAGES = 4  # of a ring that was asked for without a number


def candidates(ring: int, scheme: str, stages: int | None) -> list[Schedule]:
    """What `scheme` leaves to choose from, the most accurate first."""
    if ring == 1:
        return [Schedule("local", 1)]
    if scheme in ("gather", "joint"):
        return [Schedule(scheme, 2)]
    if scheme == "ring":
        return [Schedule("ring", stages or RING_STAGES)]
    counts = {2, 3, *(1 << power for power in range(2, ring.bit_length())), ring}
    return [
        Schedule("gather", 2),
        Schedule("joint", 2),
        *(Schedule("ring", count) for count in sorted(counts) if count <= ring),
    ]


def plan_stages(held: PieceTable, demand: KeyDemand, position: int, schedule: Schedule) -> AttentionPlan:
    """The stages of a ring position, without an exchange; `demand` is that of `held`."""
    if schedule.kind == "gather":
        return plan_gather(held, demand, position)
    if schedule.kind == "joint":
        return plan_joint(held, demand, position)
    return plan_ring(held, demand, position, schedule.distances(len(held.rows)))
