"""A picture of a plan of memory. matplotlib is imported here only when something is drawn."""

from collections.abc import Mapping
from typing import Any


def draw_memory(
    phases: Mapping[str, Mapping[str, int]],
    host: Mapping[str, int],
    room: float,
    seconds: Mapping[str, float],
    title: str,
    path: str,
) -> None:
    """Writes what is alive in each phase of a step, a stacked bar each, and what a step's time is spent on.

    Arguments:
        phases: bytes by item at the peak of each phase.
        host: bytes by item on the host.
        room: bytes that there are on the GPU.
        seconds: of a step, by item.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    memory, time = figure.subplots(1, 2, width_ratios=(1.7, 1))
    bars = {**phases, **({"host": host} if host else {})}
    sizes = {name: {item: size / 2**30 for item, size in items.items()} for name, items in bars.items()}
    _stack(memory, sizes, "GiB")
    edge = len(phases) - 0.5
    memory.hlines(room / 2**30, -0.5, edge, color="black", linestyle="--", linewidth=1)
    memory.annotate(
        f"room {room / 2**30:.1f} GiB", (edge, room / 2**30), xytext=(0, -4), textcoords="offset points",
        ha="right", va="top", fontsize=9,
    )  # fmt: skip
    memory.set_ylabel("GiB of a rank")
    memory.set_ylim(0, 1.08 * max(room / 2**30, *(sum(items.values()) for items in sizes.values())))
    _stack(time, {"a step": dict(seconds)}, "s")
    time.set_ylabel("seconds")
    time.set_xlim(-0.9, 0.9)
    figure.savefig(path)


_NAMED = 0.04  # of the axis: a part of a bar that is as high has room for its number


def _short(number: float) -> str:
    """Three digits or more."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.1f}" if number >= 10 else f"{number:.3g}"


def _stack(axes: Any, bars: Mapping[str, Mapping[str, float]], unit: str) -> None:
    """Stacked bars with a colour for each item, and their sums above."""
    import matplotlib

    items = list(dict.fromkeys(item for parts in bars.values() for item in parts))
    colours = [matplotlib.colormaps["tab20"](2 * number % 20 + (number >= 10)) for number in range(len(items))]
    tallest = max(sum(parts.values()) for parts in bars.values()) or 1.0
    for place, parts in enumerate(bars.values()):
        bottom = 0.0
        for item, colour in zip(items, colours, strict=True):
            size = parts.get(item, 0.0)
            label = item if place == next(n for n, one in enumerate(bars.values()) if item in one) else None
            axes.bar(place, size, 0.62, bottom=bottom, color=colour, edgecolor="white", linewidth=0.5, label=label)
            if size > _NAMED * tallest:
                axes.text(place, bottom + size / 2, _short(size), ha="center", va="center", fontsize=8)
            bottom += size
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(
            place, bottom + 0.006 * tallest, f"{_short(bottom)} {unit}", ha="center", va="bottom", fontsize=10,
            weight="bold", bbox=box,
        )  # fmt: skip
    axes.set_xticks(range(len(bars)), list(bars))
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda number: -items.index(labels[number]))
    axes.legend([handles[n] for n in order], [labels[n] for n in order], fontsize=9, frameon=False, loc="center left",
                bbox_to_anchor=(1, 0.5))  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
