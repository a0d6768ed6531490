"""Which steps of a run were best, by the loss on its validation sets."""

from collections.abc import Collection
from pathlib import Path

from ringattn.training.report.records import read_metrics

METRICS = "metrics.jsonl"


def validation_losses(output: Path) -> dict[int, float]:
    """The mean of the losses on all validation sets, by step; steps after which there was none are left out."""
    found = {}
    for record in read_metrics(output / METRICS):
        losses = record.get("validation")
        if isinstance(losses, dict) and losses and all(isinstance(loss, int | float) for loss in losses.values()):
            found[record["step"]] = sum(losses.values()) / len(losses)
    return found


def best_steps(output: Path, steps: Collection[int], count: int) -> list[int]:
    """Of some steps, so many with the least validation loss, best first; fewer where fewer have one.

    Arguments:
        output: the run's folder.
    """
    losses = validation_losses(output) if count else {}
    known = sorted((losses[step], step) for step in steps if step in losses)
    return [step for _, step in known[:count]]
