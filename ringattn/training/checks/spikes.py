"""Losses that jump: above a multiple of the median of the steps before."""

from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

from ringattn.training.checks.bad_numbers import BadNumbers
from ringattn.training.checks.culprit import documents_of
from ringattn.training.health.incidents import record_incident
from ringattn.training.packs.batches import Batch
from ringattn.training.packs.placing import LocalPack
from ringattn.training.report.records import read_metrics

WINDOW = 32  # steps that the median is taken of
FEWEST = 8  # below so many nothing is said
KIND = "loss-spike"


class Spikes:
    """Looks at the losses of a run, one after another; the same on every rank.

    Arguments:
        factor: a loss above so many medians is a spike; 0: none is.
        before: records of metrics.jsonl up to where the run goes on, so that it judges as if it had never stopped.
    """

    def __init__(self, factor: float, before: Iterable[dict[str, Any]] = ()) -> None:
        self._factor = factor
        self._losses: list[tuple[int, float]] = []
        self._returns: dict[int, int] = {}
        for record in before:
            if record.get("loss") is not None:
                self.median_before(record["step"], record["loss"])

    def median_before(self, step: int, loss: float) -> float | None:
        """The median that a step's loss is a spike over, or None. The loss of a spike is not remembered."""
        if not self._factor:
            return None
        known = [value for _, value in self._losses[-WINDOW:]]
        middle = median(known) if len(known) >= FEWEST else None
        if middle is not None and loss > self._factor * middle:
            return middle
        self._losses.append((step, loss))
        return None

    def back_to(self, step: int, most: int) -> None:
        """The run goes back to a checkpoint: the steps after it are forgotten.

        Raises BadNumbers when it has gone back to this one more than `most` times.
        """
        self._returns[step] = self._returns.get(step, 0) + 1
        if self._returns[step] > most:
            raise BadNumbers(
                f"the loss spiked again after the run went {most} times back to step {step} and on with other data "
                "(run.max_bad_steps of them); lower optim.lr or raise run.spike"
            )
        while self._losses and self._losses[-1][0] > step:
            self._losses.pop()


def losses_before(output: Path, step: int) -> list[dict[str, Any]]:
    """Rank 0's records of a run up to a step, the same on every rank. Collective."""
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        box = [[record for record in read_metrics(output / "metrics.jsonl") if record["step"] <= step]]
    dist.broadcast_object_list(box, src=0)
    records: list[dict[str, Any]] = box[0]
    return records


def record_spike(output: Path, step: int, loss: float, middle: float, batch: Batch[LocalPack], then: str) -> None:
    """Rank 0 says what happened, with the documents, and what is done now."""
    if dist.get_rank() != 0:
        return
    message = f"the loss of step {step} is {loss:.4f}, {loss / middle:.2f} times the median before it; {then}"
    print(f"warning: {message}", flush=True)
    packs = [documents_of(plan, None) for plan in batch.plans]
    record_incident(output, KIND, message, step=step, loss=loss, median=middle, packs=packs)
