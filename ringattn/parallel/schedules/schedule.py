"""A schedule: how the keys of a placement move."""

import itertools
from dataclasses import dataclass

from ringattn.parallel.placement.pieces import Held
from ringattn.parallel.plan.plan import AttentionPlan
from ringattn.parallel.schedules.demand import Demand
from ringattn.parallel.schedules.gather import plan_gather, plan_joint
from ringattn.parallel.schedules.ring import plan_ring


@dataclass(frozen=True)
class Candidate:
    """A way to move keys on the ring axis: "local", "gather" (one later stage), "joint" (the same with all work in it),
    or "ring" with `stages` in all."""

    schedule: str
    stages: int

    @property
    def name(self) -> str:
        return f"ring of {self.stages} stages" if self.schedule == "ring" else self.schedule

    @property
    def gathers(self) -> bool:
        """Whether each query row is computed once, over all its keys."""
        return self.schedule in ("gather", "joint")

    def distances(self, ring: int) -> list[range]:
        """For each later stage, how far away on the ring its keys come from."""
        casts = min(ring - 1, self.stages - 1)
        if casts < 1:
            return []
        bounds = [1 + index * (ring - 1) // casts for index in range(casts + 1)]
        return [range(a, b) for a, b in itertools.pairwise(bounds)]


RING_STAGES = 4  # of a ring that was asked for without a number


def candidates(ring: int, scheme: str, stages: int | None) -> list[Candidate]:
    """What `scheme` leaves to choose from, the most accurate first."""
    if ring == 1:
        return [Candidate("local", 1)]
    if scheme in ("gather", "joint"):
        return [Candidate(scheme, 2)]
    if scheme == "ring":
        return [Candidate("ring", stages or RING_STAGES)]
    counts = {2, 3, *(1 << power for power in range(2, ring.bit_length())), ring}
    return [
        Candidate("gather", 2),
        Candidate("joint", 2),
        *(Candidate("ring", count) for count in sorted(counts) if count <= ring),
    ]


def plan_stages(held: Held, demand: Demand, position: int, candidate: Candidate) -> AttentionPlan:
    """The stages of a ring position, without an exchange; `demand` is that of `held`."""
    if candidate.schedule == "gather":
        return plan_gather(held, demand, position)
    if candidate.schedule == "joint":
        return plan_joint(held, demand, position)
    return plan_ring(held, demand, position, candidate.distances(len(held.rows)))
