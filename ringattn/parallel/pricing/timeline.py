"""When the transfers and kernels of stages run beside each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np


@dataclass(frozen=True)
class StageCost:
    """One stage of one rank in one direction; or arrays, of many ranks, or of all stages (the first axis).

    Arguments:
        compute: seconds of its calls, and of merges and copies around them.
        cast: seconds on the wire before its keys are there.
        reduce: seconds on the wire to return its key gradients (backward).
        pulled: seconds of both instead, where kernels pull what travels: between others, so that nothing hides it.
        lost: seconds that kernels lose if all of the transfers travel beside them.
    """

    compute: Any
    cast: Any = 0.0
    reduce: Any = 0.0
    pulled: Any = 0.0
    lost: Any = 0.0

    @property
    def stages(self) -> "list[StageCost]":
        """The stages one by one, where the arrays hold all of them."""
        parts = (self.compute, self.cast, self.reduce, self.pulled, self.lost)
        rows = [part if np.ndim(part) else repeat(part, len(self.compute)) for part in parts]
        return [StageCost(*values) for values in zip(*rows, strict=True)]


@dataclass(frozen=True)
class DirectionCost:
    """One pass of one rank: seconds of compute, of wire, and of waiting for wire that nothing hides or for the host."""

    compute: float
    wire: float
    exposed: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


@dataclass(frozen=True)
class PlanCost:
    """Forward and backward of one rank, or of the slowest; `buffer_bytes` is memory beside q, k, v and out."""

    forward: DirectionCost
    backward: DirectionCost
    buffer_bytes: int

    @property
    def total(self) -> float:
        return self.forward.seconds + self.backward.seconds


def forward_timeline(stages: Sequence[StageCost], chunks: int = 1) -> Any:
    """Seconds that the kernels wait: each cast is posted when the keys before it are there.

    The fields of the stages may be arrays, of many ranks at once.

    Arguments:
        stages: of each of so many chunks of heads.
    """
    now: Any = 0.0
    waited: Any = 0.0
    casts = iter([stage.cast for stage in stages[1:]] * chunks)
    arrival: Any = next(casts, 0.0)
    for number, stage in [*enumerate(stages)] * chunks:
        if number:
            waited = waited + np.maximum(0.0, arrival - now)
            now = np.maximum(now, arrival)
            arrival = now + next(casts, 0.0)
        now = now + stage.compute
    return waited


def backward_timeline(stages: Sequence[StageCost], chunks: int = 1) -> Any:
    """Seconds that the kernels wait: nothing hides the first cast, and the local stage hides the last reduce.

    Casts and reduces share one wire, in the order in which the executor posts them. Arguments as in `forward_timeline`.
    """
    now: Any = 0.0
    waited: Any = 0.0
    local, *later = stages
    casts = iter([stage.cast for stage in later] * chunks)
    arrival = wire_free = next(casts, 0.0)
    for _ in range(chunks):
        returned: Any = 0.0
        for stage in later:
            waited = waited + np.maximum(0.0, arrival - now)
            now = np.maximum(now, arrival)
            cast = next(casts, None)
            if cast is not None:
                arrival = wire_free = np.maximum(now, wire_free) + cast
            now = now + stage.compute
            waited = waited + np.maximum(0.0, returned - now)
            now = np.maximum(now, returned)
            returned = wire_free = np.maximum(now, wire_free) + stage.reduce
        now = now + local.compute
        waited = waited + np.maximum(0.0, returned - now)
        now = np.maximum(now, returned)
    return waited
