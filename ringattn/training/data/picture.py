"""The picture of a run's data: lengths of documents, what each source gives, and how the first packs are filled.

matplotlib is imported here only, and only when something is drawn.
"""

from pathlib import Path
from typing import Any

from ringattn.training.data.report import DataFacts, histogram

_COLOURS = ("#3b6fb6", "#d1702f", "#4f9a5b", "#8257a5", "#b8912c", "#3a9ca6", "#b5507a", "#6b6b6b")
_SHOWN = 16  # packs that are drawn
_NAMED = 24  # characters of a source's name
_PADDING = "#e3e3e3"


def draw_data(facts: DataFacts, path: Path) -> None:
    """Writes a PNG or SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((lengths, sources), (packs, _)) = pyplot.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    grid = packs.get_gridspec()
    for axes in (packs, _):
        axes.remove()
    packs = figure.add_subplot(grid[1, :])
    _draw_lengths(lengths, facts)
    _draw_sources(sources, facts)
    _draw_packs(packs, facts)
    looked = ", as far as the stream was read" if facts.streamed else ""
    figure.suptitle(f"data={facts.name}, packs of {facts.seq_len:,} tokens{looked}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_lengths(axes: Any, facts: DataFacts) -> None:
    rows = histogram(facts.lengths)
    documents, tokens = sum(row[2] for row in rows) or 1, sum(row[3] for row in rows) or 1
    places = range(len(rows))
    axes.bar([at - 0.2 for at in places], [100 * row[2] / documents for row in rows], 0.4, color=_COLOURS[7])
    axes.bar([at + 0.2 for at in places], [100 * row[3] / tokens for row in rows], 0.4, color=_COLOURS[0])
    axes.set_xticks(list(places), [_short(row[0]) for row in rows], rotation=45 if len(rows) > 12 else 0)
    axes.legend(["of documents", "of tokens"], frameon=False)
    axes.set_xlabel("tokens of a document, from")
    axes.set_ylabel("%")
    axes.set_title(f"lengths of {documents:,} documents, {_short(tokens)} tokens", loc="left")
    _bare(axes)


def _draw_sources(axes: Any, facts: DataFacts) -> None:
    names = [part.name if len(part.name) <= _NAMED else part.name[: _NAMED - 1] + "…" for part in facts.parts]
    for number, part in enumerate(facts.parts):
        learned, drawn = 100 * part.drawn * part.learned, 100 * part.drawn
        colour = _COLOURS[number % len(_COLOURS)]
        axes.barh(number, learned, color=colour)
        axes.barh(number, drawn - learned, left=learned, color=colour, alpha=0.3)
        said = f" {drawn:.1f} % ({100 * part.learned:.0f} % learned)"
        axes.text(drawn, number, said, va="center", fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * max(100 * part.drawn for part in facts.parts) + 1)
    axes.set_ylim(max(len(names), 3) - 0.5, -0.6)
    axes.set_xlabel("% of the packs' tokens; pale: read, not learned")
    axes.set_title("what each source gives", loc="left")
    _bare(axes)


def _draw_packs(axes: Any, facts: DataFacts) -> None:
    shown = facts.plans[:_SHOWN]
    for row, (plan, sources) in enumerate(zip(shown, facts.sources, strict=False)):
        left = 0
        for segment, source in zip(plan.segments, sources, strict=True):
            width = segment.stop - segment.start
            cut = "//" if not segment.ends else None
            style = {"color": _COLOURS[source % len(_COLOURS)], "edgecolor": "white", "linewidth": 0.7}
            axes.barh(row, width, 0.8, left=left, hatch=cut, **style)
            left += width
        axes.barh(row, plan.seq_len - left, 0.8, left=left, color=_PADDING)
    axes.set_yticks([0, len(shown) - 1] if len(shown) > 1 else [0])
    axes.invert_yaxis()
    axes.set_xlim(0, max(plan.seq_len for plan in shown))
    axes.set_xlabel("tokens; grey: padding, hatched: the document goes on in a later pack")
    axes.set_ylabel("pack")
    total = max(facts.packed + facts.padding, 1)
    said = (
        f"{facts.targets / max(facts.packed, 1):.1%} targets, {facts.padding / total:.1%} padding, {facts.cuts:,} cuts"
    )
    axes.set_title(f"the first {len(shown)} of {len(facts.plans):,} packs: {said} in all of them", loc="left")
    _bare(axes)


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _short(count: int) -> str:
    for size, letter in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)
