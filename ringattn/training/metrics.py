"""What a run writes about itself, by rank 0: metrics.jsonl, progress, TensorBoard."""

import json
import os
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ringattn.training.data.meter import clock


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl.

    Arguments:
        step: counted from 1.
        loss: mean over all target tokens of the global batch, in nats.
        grad_norm: global, before clipping.
        lr: learning rate of the step.
        tokens_per_second, tokens_per_second_per_gpu: without padding; per rank where there is no GPU.
        mfu: model FLOPs utilisation, 0 to 1, causal attention counted by its true area; None on the CPU.
        peak_memory_gib: highest allocated GPU memory of rank 0, or the process's highest resident memory on the CPU.
        seconds: of the step, waiting for data included.
        tokens: seen since the start of the run.
        targets: tokens that the loss counts in this step.
        epoch: passes over the corpus since the start of the run, as in 1.25.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens_per_second: float
    tokens_per_second_per_gpu: float
    mfu: float | None
    peak_memory_gib: float
    seconds: float
    tokens: int
    targets: int
    epoch: float = 0.0

    def line(self, steps: int, left: float | None = None) -> str:
        """For people; `left` seconds are expected to the last step."""
        rest = "" if left is None else f"  {clock(left)} left"
        mfu = "" if self.mfu is None else f"  mfu {self.mfu:.1%}"
        return (
            f"step {self.step:>{len(str(steps))}}/{steps}  epoch {self.epoch:.2f}  loss {self.loss:.4f}  "
            f"grad {self.grad_norm:.3f}  "
            f"lr {self.lr:.2e}  {self.tokens_per_second:,.0f} tokens/s{mfu}  {self.peak_memory_gib:.2f} GiB  "
            f"{self.seconds:.2f} s{rest}"
        )


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory use of this process so far, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return rss / (2**30 if sys.platform == "darwin" else 2**20)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, up to a line that is none, such as one that a killed process left unfinished."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            break
        records.append(record)
    return records


class MetricsFile:
    """metrics.jsonl, opened to go on after `step`: records of later steps, which will come again, are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(partial, path)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115  open for the whole run, one write per line

    def write(self, metrics: StepMetrics) -> None:
        """Appends one line."""
        self._file.write(json.dumps(asdict(metrics)) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Progress:
    """A progress bar on a terminal; one line every `every` steps where the output goes to a file."""

    def __init__(self, step: int, steps: int, every: int) -> None:
        self._steps, self._every = steps, every
        self._seconds = 0.0  # of a step, smoothed: the first ones, which compile and allocate, are forgotten
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)

    def update(self, metrics: StepMetrics) -> None:
        """Shows a step."""
        self._seconds = 0.9 * self._seconds + 0.1 * metrics.seconds if self._seconds else metrics.seconds
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"epoch {metrics.epoch:.2f}, loss {metrics.loss:.3f}, {metrics.tokens_per_second:,.0f} tokens/s",
                refresh=False,
            )
            self._bar.update()
        elif metrics.step % self._every == 0 or metrics.step in (1, self._steps):
            print(metrics.line(self._steps, self._seconds * (self._steps - metrics.step)), flush=True)

    def close(self) -> None:
        """Ends the bar's line."""
        if self._bar is not None:
            self._bar.close()


class TensorBoard:
    """The same numbers for TensorBoard, under `folder`."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, metrics: StepMetrics) -> None:
        """Adds every number of a step."""
        for name, value in asdict(metrics).items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, metrics.step)

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()
