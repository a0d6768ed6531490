"""The figures of an evaluation, over all replicas."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.hf.batch import count_targets
from ringattn.hf.trainer.agreement import Idle
from ringattn.parallel.mesh.mesh import SequenceMesh


class Tally:
    """Loss, targets and rows of one pass over a data set."""

    def __init__(self, mesh: SequenceMesh) -> None:
        self.mesh, self.steps, self.prefix = mesh, 0, ""

    def clear(self, prefix: str) -> None:
        self.steps, self.prefix = 0, prefix
        self.totals = torch.zeros(3, dtype=torch.float64, device=self.mesh.device)  # loss sum, targets, rows

    def add(self, loss: Tensor, batch: Mapping[str, Any]) -> None:
        """Count a batch of each replica; `loss` is the mean over their targets. Collective over replicas."""
        labels = batch["labels"]
        rows = 0 if isinstance(batch, Idle) else len(torch.atleast_2d(labels))
        targets = count_targets(batch)
        counts = torch.stack([targets, targets.new_tensor(rows)]).to(self.totals.device)
        if self.mesh.data > 1:
            dist.all_reduce(counts, group=self.mesh.device_mesh.get_group("data"))
        self.totals[0] += loss.double() * counts[0]
        self.totals[1:] += counts
        self.steps += 1

    @property
    def mean(self) -> float:
        """The mean loss over all targets; NaN without any."""
        return float(self.totals[0] / self.totals[1]) if self.totals[1] else float("nan")

    @property
    def rows(self) -> int:
        return int(self.totals[2])

    def correct_speed(self, logs: dict[str, float]) -> None:
        """Put the right number of steps a second into `logs`: the stock Trainer takes all ranks for replicas."""
        rate, seconds = (f"{self.prefix}_{name}" for name in ("steps_per_second", "runtime"))
        if self.prefix and logs.get(seconds) and rate in logs:
            logs[rate] = round(self.steps / logs[seconds], 3)
