"""The pictures of an evaluation. matplotlib is imported here only, and only where something is drawn."""

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COLOURS = ("#1f4e8c", "#d1702f", "#3f8f5b", "#8257a5", "#a23b3b")


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """Axes of a new figure, which is written to `path` (PNG) whole or not at all."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 11}):
        figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure.add_subplot()
        partial = path.with_name(path.name + ".partial")
        figure.savefig(partial, format="png")
    os.replace(partial, path)


def tokens_of(count: float) -> str:
    """A number of tokens, for people: 512, 1K, 1.5K, 128K, 1M."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:g}"


def draw_heat_map(
    path: Path, lengths: Sequence[int], depths: Sequence[float], shares: Sequence[Sequence[float]], title: str
) -> None:
    """Shares of right answers, `shares[depth][length]`: lengths are columns, depths rows; NaN where none was asked."""
    with _figure(path, max(6.0, 2.6 + 0.75 * len(lengths)), max(3.2, 1.8 + 0.42 * len(depths))) as axes:
        image = axes.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(lengths)), [tokens_of(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set(title=title, xlabel="tokens of the document", ylabel="depth of the needle")
        if len(lengths) * len(depths) <= 200:
            for row, values in enumerate(shares):
                for column, value in enumerate(values):
                    if not math.isnan(value):
                        colour = "black" if 0.15 < value < 0.85 else "white"  # the ends of the scale are dark
                        axes.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=9, color=colour)
        axes.figure.colorbar(image, ax=axes, label="right answers", format=lambda value, _: f"{value:.0%}")


def draw_positions(path: Path, edges: Sequence[int], losses: Mapping[str, Sequence[float]], title: str) -> None:
    """Losses by position in the document, a line for each name; NaN where no document is that long."""
    middles = [(first + last) / 2 for first, last in itertools.pairwise(edges)]
    with _figure(path, 8, 4.5) as axes:
        for number, (name, values) in enumerate(losses.items()):
            axes.plot(
                middles,
                values,
                marker="o",
                markersize=3,
                linewidth=1.8,
                label=name,
                color=COLOURS[number % len(COLOURS)],
            )
        axes.set_xscale("log", base=2)
        ticks = [tick for tick in (1 << power for power in range(31)) if edges[0] <= tick <= edges[-1]]
        ticks = ticks[:: max(1, math.ceil(len(ticks) / 12))]
        axes.set_xticks(ticks, [tokens_of(tick) for tick in ticks])
        axes.set(title=title, xlabel="position in the document (tokens)", ylabel="loss (nats per token)")
        axes.grid(alpha=0.3)
        if len(losses) > 1:
            axes.legend(frameon=False)


def draw_by_length(path: Path, lengths: Sequence[int], shares: Mapping[str, Sequence[float]], title: str) -> None:
    """Shares of right answers by length, a line for each task."""
    with _figure(path, 8, 4.5) as axes:
        for number, (name, values) in enumerate(shares.items()):
            axes.plot(lengths, values, marker="o", linewidth=1.8, label=name, color=COLOURS[number % len(COLOURS)])
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [tokens_of(length) for length in lengths])
        axes.minorticks_off()
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set(title=title, xlabel="tokens of the document", ylabel="right answers")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
