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
        tokens_per_second, tokens_per_second_per_gpu: without padding; per rank where there is no GPU. None in a warm-up
            step.
        mfu: model FLOPs utilisation, 0 to 1, causal attention counted by its true area; None on the CPU and in a
            warm-up step.
        peak_memory_gib: highest allocated GPU memory of rank 0, or the process's highest resident memory on the CPU.
        seconds: of the step, waiting for data included.
        tokens: seen since the start of the run.
        targets: tokens that the loss counts in this step.
        epoch: passes over the corpus since the start of the run, as in 1.25.
        waited: seconds of the step that it waited for its batch.
        warmup: whether it is the first step of a process, which compiles kernels and makes room: its seconds say
            nothing about the others, so it has no rates.
        validation: mean loss over all targets of each validation set after the step, in nats; None where it was not
            their turn. Its time is not of `seconds`.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens_per_second: float | None
    tokens_per_second_per_gpu: float | None
    mfu: float | None
    peak_memory_gib: float
    seconds: float
    tokens: int
    targets: int
    epoch: float = 0.0
    waited: float = 0.0
    warmup: bool = False
    validation: dict[str, float] | None = None

    def line(self, steps: int, left: float | None = None) -> str:
        """For people; `left` seconds are expected to the last step."""
        rest = "" if left is None else f"  {clock(left)} left"
        mfu = "" if self.mfu is None else f"  mfu {self.mfu:.1%}"
        held_out = "".join(f"  {name} {loss:.4f}" for name, loss in (self.validation or {}).items())
        return (
            f"step {self.step:>{len(str(steps))}}/{steps}  epoch {self.epoch:.2f}  loss {self.loss:.4f}  "
            f"grad {self.grad_norm:.3f}  "
            f"lr {self.lr:.2e}  {self.rate}{mfu}  {self.peak_memory_gib:.2f} GiB  "
            f"{self.seconds:.2f} s{rest}{held_out}"
        )

    @property
    def rate(self) -> str:
        """Tokens a second, for people."""
        return "warm-up" if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f} tokens/s"


@dataclass(frozen=True)
class StepSeconds:
    """How long a step took; see `StepMetrics`."""

    seconds: float
    waited: float
    warmup: bool

    def rates(self, tokens: int, ranks: int, at_peak: float | None) -> dict[str, Any]:
        """What `StepMetrics` says about it.

        Arguments:
            tokens: of the step.
            at_peak: seconds that the ranks would take at the peak of their GPUs; None where that is not known.
        """
        known = asdict(self)
        if self.warmup:
            return known | {"tokens_per_second": None, "tokens_per_second_per_gpu": None, "mfu": None}
        rate = tokens / self.seconds
        mfu = None if at_peak is None else at_peak / self.seconds
        return known | {"tokens_per_second": rate, "tokens_per_second_per_gpu": rate / ranks, "mfu": mfu}


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
        self._seconds = 0.0  # of a step, smoothed; warm-up steps are left out
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)
            self._bar.set_postfix_str("the first step compiles")

    def update(self, metrics: StepMetrics) -> None:
        """Shows a step."""
        if not metrics.warmup:
            self._seconds = 0.9 * self._seconds + 0.1 * metrics.seconds if self._seconds else metrics.seconds
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"epoch {metrics.epoch:.2f}, loss {metrics.loss:.3f}, {metrics.rate}", refresh=False
            )
            self._bar.update()
        elif metrics.step % self._every == 0 or metrics.step in (1, self._steps) or metrics.validation:
            left = None if metrics.warmup else self._seconds * (self._steps - metrics.step)
            print(metrics.line(self._steps, left), flush=True)

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
        values = asdict(metrics)
        held_out = values.pop("validation") or {}
        for name, value in (values | {f"validation/{name}": loss for name, loss in held_out.items()}).items():
            if name not in ("step", "warmup") and value is not None:
                self._writer.add_scalar(name, value, metrics.step)

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()
