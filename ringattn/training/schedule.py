"""The learning rate as a pure function of the step: linear warm-up, then constant, a cosine, or a late linear decay."""

import math
from dataclasses import dataclass

SHAPES = ("cosine", "constant", "wsd")


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then one of three shapes.

    Arguments:
        peak: highest learning rate, reached at the end of the warm-up.
        warmup_steps: steps of the warm-up; the first step already moves (peak / warmup_steps).
        total_steps: the step at which the rate is at its end.
        min_ratio: the last rate as a fraction of the peak; a constant one has no other than the peak.
        shape: `cosine` falls from the warm-up to the end; `constant` stays at the peak; `wsd` stays there and falls
            linearly in the last `decay_steps` (warmup-stable-decay: MiniCPM, arXiv 2404.06395).
        decay_steps: of `wsd` alone.

    It has no state: a resumed run asks for the rate of the step it resumes at. Only `wsd` and `constant` have the same
    rates before their end whatever `total_steps` is, so that such a run can be made longer from a checkpoint in the
    stable part.
    """

    peak: float
    warmup_steps: int
    total_steps: int
    min_ratio: float
    shape: str = "cosine"
    decay_steps: int = 0

    def __call__(self, step: int) -> float:
        """The rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        return self.peak * (self.min_ratio + (1.0 - self.min_ratio) * self._height(step))

    def _height(self, step: int) -> float:
        """1 at the peak, 0 at the end."""
        if self.shape == "constant":
            return 1.0
        if self.shape == "wsd":
            left = self.total_steps - step
            return min(1.0, max(0, left) / max(1, self.decay_steps))
        span = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / span)
        return 0.5 * (1.0 + math.cos(math.pi * progress))
