"""loss.png: the loss curve of a run, raw and smoothed."""

import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ringattn.training.report.metrics import read_metrics


class LossCurve:
    """The picture of a run, drawn in a thread: it takes up to a second, in which all ranks would wait for this one.

    Arguments:
        metrics: the metrics.jsonl that it is drawn from.
        path: the PNG.
    """

    def __init__(self, metrics: Path, path: Path, title: str) -> None:
        self._metrics, self._path, self._title = metrics, path, title
        self._lock, self._asked = threading.Lock(), False
        self._thread: threading.Thread | None = None

    def draw(self) -> None:
        """Soon, of all steps until now at least. A picture that cannot be drawn costs a warning."""
        with self._lock:
            self._asked = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._draw, name="drawing", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Waits for what was asked for."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def _draw(self) -> None:
        while self._is_asked():
            try:
                plot_loss(read_metrics(self._metrics), self._path, self._title)
            except Exception as error:  # a run does not end for a picture
                print(f"warning: {self._path} could not be drawn: {error}", file=sys.stderr, flush=True)

    def _is_asked(self) -> bool:
        with self._lock:
            asked, self._asked = self._asked, False
            if not asked:
                self._thread = None
            return asked


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
    with matplotlib.rc_context({"font.size": 11}):
        figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.plot(steps, losses, color="#9db8d9", linewidth=1, label="each step")
        axes.plot(steps, smoothed(losses), color="#1f4e8c", linewidth=2, label="smoothed")
        axes.set(title=title, xlabel="optimiser step", ylabel="loss (nats per target token)")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        if losses:
            axes.annotate(
                f"{smoothed(losses)[-1]:.3f}",
                (steps[-1], smoothed(losses)[-1]),
                textcoords="offset points",
                xytext=(4, 8),
                ha="right",
            )
        partial = path.with_name(path.name + ".partial")
        figure.savefig(partial, format="png")
    os.replace(partial, path)
