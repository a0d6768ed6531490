"""Which steps of a run were best, by the loss on its validation sets."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ringattn.training.report.records import read_metrics

METRICS = "metrics.jsonl"


class BestSteps:
    """Remembers the mean of the losses on all validation sets, by step. What a run wrote before it was started again is
    read once, here: a file of all its steps takes longer with each of them, and is asked about at every save.

    Arguments:
        output: the run's folder.
        count: so many are best; 0: nothing is read or remembered.
    """

    def __init__(self, output: Path, count: int) -> None:
        self._count = count
        self._losses: dict[int, float] = {}
        for record in read_metrics(output / METRICS) if count else ():
            self.note(record["step"], record.get("validation"))

    def note(self, step: int, losses: Any) -> None:
        """The losses after a step, by validation set; None where it was not their turn. Of those that are no finite
        numbers nothing is known."""
        if not self._count or not isinstance(losses, dict) or not losses:
            return
        if all(isinstance(loss, int | float) and math.isfinite(loss) for loss in losses.values()):
            self._losses[step] = sum(losses.values()) / len(losses)

    def back_to(self, step: int) -> None:
        """The steps after this one will come again."""
        self._losses = {one: loss for one, loss in self._losses.items() if one <= step}

    def __call__(self, steps: Collection[int]) -> list[int]:
        """Of some steps, so many with the least validation loss, best first; fewer where fewer have one."""
        known = sorted((self._losses[step], step) for step in steps if step in self._losses)
        return [step for _, step in known[: self._count]]
