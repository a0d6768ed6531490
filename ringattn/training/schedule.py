"""The learning rate as a pure function of the step: linear warm-up, then a cosine down to a fraction of the peak."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up + cosine.

    Arguments:
        peak: highest learning rate, reached at the end of the warm-up.
        warmup_steps: steps of the warm-up; the first step already moves (peak / warmup_steps).
        total_steps: the step at which the cosine ends.
        min_ratio: the last rate as a fraction of the peak.

    It has no state: a resumed run asks for the rate of the step it resumes at.
    """

    peak: float
    warmup_steps: int
    total_steps: int
    min_ratio: float

    def __call__(self, step: int) -> float:
        """The rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        span = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / span)
        cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.peak * (self.min_ratio + (1.0 - self.min_ratio) * cosine)
