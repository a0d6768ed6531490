"""loss.png: the loss curve of a run, raw and smoothed."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


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
