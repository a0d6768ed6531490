"""loss.png: the loss curve of a run, raw and smoothed."""

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ringattn.training.report.beside import beside
from ringattn.training.report.records import read_metrics

LONGEST = 30.0  # seconds that the end of a run waits for a picture, less than looks like a hang


class LossCurve:
    """The picture of a run, drawn in a process of its own.

    It takes up to a second, and more after many steps, all of it in Python: a thread would take the interpreter's lock
    from the step, which then stands still as long as if it drew by itself. One thread may call it.

    Arguments:
        metrics: the metrics.jsonl that it is drawn from.
        path: the PNG.
    """

    def __init__(self, metrics: Path, path: Path, title: str) -> None:
        self._metrics, self._path, self._title = metrics, path, title
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = False

    def draw(self) -> None:
        """Soon, of all steps that the file has. What is asked for while one is drawn comes with the next one, at the
        latest at the end. A picture that cannot be drawn costs a warning."""
        self._asked = True
        if self._process is None or self._process.poll() is not None:
            self._next()

    def close(self) -> None:
        """Waits for what was asked for, but not longer than `LONGEST`."""
        while self._process is not None:
            try:
                self._process.wait(LONGEST)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process = None
                self._warn(f"it took more than {LONGEST:.0f} s")
                return
            self._next()

    def leave(self) -> None:
        """At the end of a run that failed: what was asked for is drawn, but nobody waits for it."""
        if self._asked:
            self._start()

    def _next(self) -> None:
        """After a picture, if there was one: the next, if it was asked for."""
        ended, self._process = self._process, None
        if ended is not None and ended.returncode:
            self._warn(f"its process ended with exit code {ended.returncode}")
        if self._asked:
            self._start()

    def _start(self) -> None:
        self._asked = False
        try:
            self._process = beside("ringattn.training.report.plot", self._metrics, self._path, self._title)
        except OSError as error:  # no room for a process
            self._warn(error)

    def _warn(self, error: object) -> None:
        print(_warning(self._path, error), file=sys.stderr, flush=True)


def main() -> None:
    """Of the process. Its arguments are those of `LossCurve`."""
    metrics, path, title = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    try:
        plot_loss(read_metrics(metrics), path, title)
    except Exception as error:  # a run does not end for a picture
        print(_warning(path, error), file=sys.stderr, flush=True)


def _warning(path: Path, error: object) -> str:
    return f"warning: {path} could not be drawn: {error}"


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the bias of its first value."""
    average, total, out = 0.0, 0.0, []
    for value in values:
        average = weight * average + (1 - weight) * value
        total = weight * total + (1 - weight)
        out.append(average / total)
    return out


def plot_loss(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draws the `loss` of metrics.jsonl records over tokens seen and writes a PNG, atomically."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = [record for record in records if record["loss"] is not None]
    steps = [record["step"] for record in known]
    losses = [record["loss"] for record in known]
    smooth = smoothed(losses)
    with matplotlib.rc_context({"font.size": 11}):
        figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.plot(steps, losses, color="#9db8d9", linewidth=1, label="each step")
        axes.plot(steps, smooth, color="#1f4e8c", linewidth=2, label="smoothed")
        axes.set(title=title, xlabel="optimiser step", ylabel="loss (nats per target token)")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        if losses:
            axes.annotate(
                f"{smooth[-1]:.3f}",
                (steps[-1], smooth[-1]),
                textcoords="offset points",
                xytext=(4, 8),
                ha="right",
            )
        # Of this process alone: of two that draw at once, each makes a whole picture.
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            figure.savefig(partial, format="png")
            partial.replace(path)
        finally:
            with suppress(OSError):
                partial.unlink()
