"""What a run writes about itself, by rank 0: metrics.jsonl and progress."""

import io
import json
import math
import os
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ringattn.training.data.meter import clock
from ringattn.training.report.records import read_metrics


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl.

    Arguments:
        step: counted from 1.
        loss: mean over all target tokens of the global batch, in nats; None where it has no target, and where it is
            not finite, which JSON cannot say.
        grad_norm: global, before clipping; None where it is not finite.
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
        skipped: the step left weights and moments as they were, for its loss or gradient was not finite.
        validation: mean loss over all targets of each validation set after the step, in nats; None where it was not
            their turn. Its time is not of `seconds`.
    """

    step: int
    loss: float | None
    grad_norm: float | None
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
    skipped: bool = False
    validation: dict[str, float] | None = None

    def line(self, steps: int, left: float | None = None) -> str:
        """For people; `left` seconds are expected to the last step."""
        rest = "" if left is None else f"  {clock(left)} left"
        mfu = "" if self.mfu is None else f"  mfu {self.mfu:.1%}"
        none = "not finite" if self.targets else "of no target"
        loss = none if self.loss is None else f"{self.loss:.4f}"
        norm = "not finite" if self.grad_norm is None else f"{self.grad_norm:.3f}"
        held_out = "".join(f"  {name} {loss:.4f}" for name, loss in (self.validation or {}).items())
        return (
            f"step {self.step:>{len(str(steps))}}/{steps}  epoch {self.epoch:.2f}  loss {loss}  grad {norm}  "
            f"lr {self.lr:.2e}  {self.rate}{mfu}  {self.peak_memory_gib:.2f} GiB  "
            f"{self.seconds:.2f} s{self.waits}{rest}{'  left out' if self.skipped else ''}{held_out}"
        )

    @property
    def rate(self) -> str:
        """Tokens a second, for people."""
        return "warm-up" if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f} tokens/s"

    @property
    def waits(self) -> str:
        """How much of the step it waited for its batch, for people; nothing below a hundredth."""
        share = self.waited / self.seconds if self.seconds > 0 else 0.0
        return f" ({share:.0%} waiting for data)" if share >= 0.01 and not self.warmup else ""


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


class MetricsFile:
    """metrics.jsonl, opened to go on after `step`: records of later steps, which will come again, are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self._file = self._opened(step)
        self._waiting = b""  # what a full disk did not take

    def write(self, metrics: StepMetrics) -> None:
        """Appends one line; where the disk does not take it, it is kept for the next call, with one warning."""
        line = json.dumps(asdict(metrics)).encode() + b"\n"
        full = bool(self._waiting)
        self._waiting += line
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not full:
                print(f"warning: {self._path} cannot be written now: {error.strerror}", file=sys.stderr, flush=True)

    def back_to(self, step: int) -> None:
        """Drops the records of later steps."""
        self._file.close()
        self._file, self._waiting = self._opened(step), b""

    def validated(self, step: int, losses: dict[str, float]) -> None:
        """Adds what validation sets say of the newest step, which was recorded without."""
        self._file.close()
        self._file = self._opened(step, {"validation": losses})

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _opened(self, step: int, facts: dict[str, Any] | None = None) -> io.FileIO:
        """The file with the records up to a step, of which more facts are known now."""
        kept = [record for record in read_metrics(self._path) if record["step"] <= step]
        kept = [record | facts if facts and record["step"] == step else record for record in kept]
        partial = self._path.with_name(self._path.name + ".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(partial, self._path)
        return open(self._path, "ab", buffering=0)  # open for the whole run, one write per line


class Progress:
    """A progress bar on a terminal; one line every `every` steps where the output goes to a file."""

    def __init__(self, step: int, steps: int, every: int) -> None:
        self._steps, self._every = steps, every
        self._seconds = 0.0  # of a step, smoothed; warm-up steps are left out
        self._bar: Any = None
        self._held_out = ""  # the newest losses of validation sets
        self._warned = False  # of a step without a target
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)
            self._bar.set_postfix_str("the first step compiles")

    def update(self, metrics: StepMetrics) -> None:
        """Shows a step, and warns of the first one that has nothing to learn."""
        if not (metrics.targets or self._warned):
            self._warned = True
            print(
                f"warning: step {metrics.step} has no token to learn, as where packs hold parts of long questions "
                "alone: longer packs (data.seq_len) or data.pad=true leave questions and answers together; "
                "`ringattn data` shows what packs hold",
                file=sys.stderr,
                flush=True,
            )
        if not metrics.warmup:
            self._seconds = 0.9 * self._seconds + 0.1 * metrics.seconds if self._seconds else metrics.seconds
        if metrics.validation:
            self._held_out = "".join(f", {name} {loss:.3f}" for name, loss in metrics.validation.items())
        if self._bar is not None:
            mfu = "" if metrics.mfu is None else f", mfu {metrics.mfu:.1%}"
            loss = math.nan if metrics.loss is None else metrics.loss
            self._bar.set_postfix_str(
                f"epoch {metrics.epoch:.2f}, loss {loss:.3f}{self._held_out}, {metrics.rate}{mfu}{metrics.waits}",
                refresh=False,
            )
            self._bar.update()
        elif metrics.step % self._every == 0 or metrics.step in (1, self._steps) or metrics.validation:
            left = None if metrics.warmup else self._seconds * (self._steps - metrics.step)
            print(metrics.line(self._steps, left), flush=True)

    def close(self) -> None:
        """Ends the bar's line."""
        if self._bar is not None:
            self._bar.close()
