"""Losses that jump: above a multiple of the median of the steps before."""

from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Any

WINDOW = 32  # steps that the median is taken of
FEWEST = 8  # below so many nothing is said


class Spikes:
    """Looks at the losses of a run, one after another.

    Arguments:
        factor: a loss above so many medians is a spike; 0: none is.
        before: records of metrics.jsonl up to where the run goes on, so that it judges as if it had never stopped.
    """

    def __init__(self, factor: float, before: Iterable[dict[str, Any]] = ()) -> None:
        self._factor = factor
        self._losses: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        for record in before:
            if record.get("loss") is not None:
                self.median_before(record["step"], record["loss"])

    def median_before(self, step: int, loss: float) -> float | None:
        """The median that a step's loss is a spike over, or None. The loss of a spike is not remembered."""
        known = [value for _, value in self._losses]
        middle = median(known) if len(known) >= FEWEST else None
        if self._factor and middle is not None and loss > self._factor * middle:
            return middle
        self._losses.append((step, loss))
        return None

    def back_to(self, step: int) -> None:
        """Forgets the steps after one that the run goes back to."""
        while self._losses and self._losses[-1][0] > step:
            self._losses.pop()
