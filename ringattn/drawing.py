"""Pictures of plans: the mask with every rank's blocks in its colour, and what each rank does when.

matplotlib is imported here only, and only when something is drawn.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ringattn.kernels.backends.reference import allowed_pairs
from ringattn.kernels.spec import Range
from ringattn.parallel.plan.plan import AttentionPlan
from ringattn.parallel.simulation.spans import Pass, Span

PIXELS = 600  # of the mask's side at most
LANES = 16  # ranks in a timeline at most
SPARSE = 0.01  # with less of the mask drawn than this share, a part of it is shown larger
WIRE = {"cast": "#3b6fb6", "reduce": "#d1702f", "exchange": "#8257a5", "states": "#3f8f63"}
Colour = tuple[float, float, float]


def check_drawing(path: str) -> None:
    """Raises ValueError if `path` is no .png or .svg, or matplotlib is missing."""
    if Path(path).suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"a picture is a .png or .svg file, got {path!r}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install 'ringattn[draw]'") from None


def mask_image(
    plans: Sequence[AttentionPlan], tokens: Range, pixels: int = PIXELS
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int16]]:
    """Who computes which (query, key) pair, and in which stage: two (n, n) arrays, -1 where nothing is computed.

    Arguments:
        plans: one of every ring position.
        tokens: `[start, stop)` of the stream; of more than `pixels` each pixel shows the pair of tokens in its middle.
    """
    side = min(tokens[1] - tokens[0], pixels)
    samples = tokens[0] + (2 * np.arange(side) + 1) * (tokens[1] - tokens[0]) // (2 * side)
    owner, when = (np.full((side, side), -1, np.int16) for _ in range(2))
    for position, plan in enumerate(plans):
        queries = _sampled(plan.index, samples)
        for number, stage in enumerate(plan.stages):
            keys = queries if number == 0 else _sampled(stage.index, samples)
            for call in stage.calls:
                for block in call.blocks:
                    q_pixels, q_rows = _inside(queries, block.q)
                    k_pixels, k_rows = _inside(keys, block.k)
                    if len(q_pixels) and len(k_pixels):
                        # As in `Block`: query i sees the keys from i + m - n - left to i + m - n + right.
                        seen = (k_rows[None] - block.k[1]) - (q_rows[:, None] - block.q[1])
                        allowed = np.ones(seen.shape, bool)
                        if call.right >= 0:
                            allowed &= seen <= call.right
                        if call.left >= 0:
                            allowed &= seen >= -call.left
                        at = np.ix_(q_pixels, k_pixels)
                        owner[at] = np.where(allowed, position, owner[at])
                        when[at] = np.where(allowed, number, when[at])
    return owner, when


Sampled = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]  # pixels and rows, by ascending row


def _sampled(index: Sequence[Range], samples: npt.NDArray[np.int64]) -> Sampled:
    """Pixels whose token is among the rows that `index` describes, and the rows."""
    pixels, rows, row = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for start, stop in index:
        first, last = np.searchsorted(samples, [start, stop])
        pixels.append(np.arange(first, last))
        rows.append(samples[first:last] - start + row)
        row += stop - start
    return np.concatenate(pixels), np.concatenate(rows)


def _inside(sampled: Sampled, span: Range) -> Sampled:
    """Of sampled pixels and rows those whose row is in `span`."""
    first, last = np.searchsorted(sampled[1], span)
    return sampled[0][first:last], sampled[1][first:last]


def draw_plan(
    plans: Sequence[AttentionPlan],
    tokens: int,
    passes: Mapping[str, Pass],
    schedules: Mapping[str, str],
    title: str,
    path: str,
) -> None:
    """Writes the picture of all ranks' plans.

    Arguments:
        plans: of every sequence rank.
        passes, schedules: "forward" and "backward", as simulated, and the names of their schedules; also passes of a
            layer that carries a state, by names of their own.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ulysses = len(plans) // plans[0].ring
    lanes = min(len(plans), LANES)
    height = (6.5 if lanes <= 8 else 8.5) * max(2, len(passes)) / 2
    figure = Figure(figsize=(15, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    grid = figure.add_gridspec(len(passes), 2, width_ratios=(1, 1.25))
    colours = rank_colours(plans[0].ring)
    axes = figure.add_subplot(grid[:, 0])
    _draw_mask(axes, plans[::ulysses], ulysses, tokens, colours)
    if len(colours) > 10:
        _colour_scale(figure, axes, colours, "rank" if ulysses == 1 else "ring position")
    stages = max(len(plan.stages) for one in plans for plan in one.passes)
    for number, (name, done) in enumerate(passes.items()):
        axes = figure.add_subplot(grid[number, 1])
        _draw_timeline(axes, done, ulysses, colours, stages)
        axes.set_title(f"{name}: {schedules[name]}, {done.seconds * 1e3:.2f} ms", fontsize=10, loc="left")
    _wire_legend(figure, {span.kind for one in passes.values() for span in one.spans})
    figure.savefig(path)


def rank_colours(count: int) -> list[Colour]:
    """Colours by which neighbours can be told apart; for more than ten, a colour scale."""
    import matplotlib

    if count <= 10:
        found = [matplotlib.colormaps["tab10"](index) for index in range(count)]
    else:
        found = [matplotlib.colormaps["turbo"](0.04 + 0.9 * index / (count - 1)) for index in range(count)]
    return [(red, green, blue) for red, green, blue, _ in found]


def lightened(colour: Colour, stage: int, stages: int) -> Colour:
    """A colour for a stage: full for stage 0, and lighter the later a stage is."""
    share = 0.0 if stage == 0 else 0.35 + 0.35 * (stage - 1) / max(1, stages - 2)
    red, green, blue = (part + (1 - part) * share for part in colour)
    return red, green, blue


def _draw_mask(axes: Any, plans: Sequence[AttentionPlan], ulysses: int, tokens: int, colours: list[Colour]) -> None:
    """The square of all queries and keys, each pair in the colour of who computes it."""
    from matplotlib.patches import Patch

    drawn = _draw_blocks(axes, plans, (0, tokens), colours)
    axes.set(xlabel="key (token of the stream)", ylabel="query")
    if drawn < SPARSE:
        _draw_corner(axes, plans, tokens, colours)
    who = "rank" if ulysses == 1 else "ring position"
    lines = [f"who computes what, by {who}"]
    lines += [] if ulysses == 1 else [f"its {ulysses} ulysses ranks have a share of the heads each"]
    lines += ["lighter: in a later stage, over keys from other ranks"] if len(plans[0].stages) > 1 else []
    axes.set_title("\n".join(lines), fontsize=10, loc="left")
    if len(colours) <= 10:
        handles = [Patch(color=colour, label=str(position)) for position, colour in enumerate(colours)]
        axes.legend(handles=handles, loc="upper right", fontsize=9, title=who)


def _draw_corner(axes: Any, plans: Sequence[AttentionPlan], tokens: int, colours: list[Colour]) -> None:
    """Show a few documents enlarged, in the empty corner of a mask whose documents are too short to be seen."""
    size = tokens // 8
    while size > 256 and (mask_image(plans, (tokens // 2, tokens // 2 + size), 64)[0] >= 0).mean() < 8 * SPARSE:
        size //= 2
    corner = axes.inset_axes((0.03, 0.03, 0.45, 0.45))
    _draw_blocks(corner, plans, (tokens // 2, tokens // 2 + size), colours)
    corner.set_title(f"{size} tokens in the middle", fontsize=9)
    corner.set(xticks=[], yticks=[])


def _draw_blocks(axes: Any, plans: Sequence[AttentionPlan], tokens: Range, colours: list[Colour]) -> float:
    """Draw the pairs of a span of tokens; returns the share of its square that is computed."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    owner, when = mask_image(plans, tokens)
    stages = max(len(plan.stages) for plan in plans)
    image = np.ones((*owner.shape, 3))
    drawn = owner >= 0
    for position, stage in np.unique(np.stack([owner[drawn], when[drawn]]), axis=1).T.tolist():
        image[(owner == position) & (when == stage)] = lightened(colours[position], stage, stages)
    first, last = tokens
    axes.imshow(image, extent=(first, last, last, first), interpolation="nearest")
    unit, name = (1e6, "M") if last - first >= 4e6 else (1e3, "K") if last - first >= 4e3 else (1, "")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6))
        axis.set_major_formatter(FuncFormatter(lambda token, _: f"{token / unit:g}{name}"))
    return float(drawn.mean())


def _colour_scale(figure: Any, axes: Any, colours: list[Colour], label: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    scale = ScalarMappable(Normalize(-0.5, len(colours) - 0.5), ListedColormap(colours))
    figure.colorbar(scale, ax=axes, label=label, shrink=0.6, pad=0.02)


def shown_ranks(done: Pass) -> list[int]:
    """All ranks, or of many an even selection with the first and the last to be done among them."""
    ranks = range(done.ranks)
    if done.ranks <= LANES:
        return list(ranks)
    ends = done.ends
    chosen = {min(ranks, key=lambda rank: ends[rank]), max(ranks, key=lambda rank: ends[rank])}
    even = [index * (done.ranks - 1) // (LANES - 3) for index in range(LANES - 2)]
    return sorted(chosen | set(even))


def _draw_timeline(axes: Any, done: Pass, ulysses: int, colours: list[Colour], stages: int) -> None:
    """A lane per rank: kernels above, transfers below."""
    ranks = shown_ranks(done)
    lane = {rank: number for number, rank in enumerate(ranks)}
    unit = 1e3  # milliseconds
    for span in done.spans:
        if span.rank not in lane or span.end <= span.begin:
            continue
        top = lane[span.rank]
        if span.kind == "compute":
            colour: Any = lightened(colours[span.rank // ulysses], span.stage, stages)
            place = (top - 0.38, 0.44)
        else:
            colour, place = WIRE[span.kind], (top + 0.1 + 0.14 * (span.kind == "reduce"), 0.12)
        axes.broken_barh(
            [(span.begin * unit, (span.end - span.begin) * unit)], place, color=colour, edgecolor="white", linewidth=0.4
        )
        _name_stage(axes, span, top, done.seconds)
    axes.set_yticks(range(len(ranks)), [str(rank) for rank in ranks], fontsize=8)
    axes.set(ylim=(len(ranks) - 0.4, -0.6), xlim=(0, done.seconds * unit or 1), xlabel="ms")
    axes.set_ylabel("rank" if len(ranks) == done.ranks else f"rank ({len(ranks)} of {done.ranks})")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _name_stage(axes: Any, span: Span, top: int, seconds: float) -> None:
    """Write the number of its stage on a kernel that is long enough to hold it."""
    if span.kind == "compute" and span.end - span.begin > 0.03 * seconds:
        axes.text((span.begin + span.end) / 2 * 1e3, top - 0.16, str(span.stage), ha="center", va="center", fontsize=7)


def _wire_legend(figure: Any, kinds: set[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color="#999999", label="kernels (number: stage)")]
    told = {kind: f"{kind}, from its post to its end" for kind in WIRE} | {"states": "a wait for states"}
    handles += [Patch(color=colour, label=told[kind]) for kind, colour in WIRE.items() if kind in kinds]
    figure.legend(handles=handles, loc="outside lower right", ncols=4, fontsize=9, frameon=False)


def draw_scaling(curves: Mapping[str, Sequence[tuple[int, float]]], title: str, path: str) -> None:
    """Writes efficiency against GPUs: a curve of (GPUs, efficiency) for each label."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    styles = zip(rank_colours(max(2, len(curves))), "os^Dv<>p" * len(curves), strict=False)
    for (label, points), (colour, marker) in zip(curves.items(), styles, strict=False):
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label)
    gpus = sorted({number for points in curves.values() for number, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(gpus, [str(number) for number in gpus])
    axes.set(title=title, xlabel="GPUs", ylabel="efficiency, forward and backward", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)


_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def stage_of_pairs(plan: AttentionPlan, total: int) -> Tensor:
    """(T, T) [query, key] in global indices: the stage in which a ring position computes a pair, or -1.

    Raises ValueError if the plan computes a pair more than once.
    """
    found = torch.full((total, total), -1, dtype=torch.int16)
    queries = _indices(plan.index)
    for number, stage in enumerate(plan.stages):
        keys = _indices(stage.index if number else plan.index)
        for call in stage.calls:
            for block in call.blocks:
                n = block.q[1] - block.q[0]
                rows, columns = queries[slice(*block.q)], keys[slice(*block.k)]
                seen = allowed_pairs(block, call.left, call.right, (0, n), found.device)
                part = found[rows[:, None], columns[None, :]]
                if (part[seen] >= 0).any():
                    raise ValueError(f"stage {number} of ring position {plan.ring_rank} computes a pair again: {block}")
                part[seen] = number
                found[rows[:, None], columns[None, :]] = part
    return found


def area(plan: AttentionPlan) -> int:
    """Number of pairs that a ring position computes: 2 (D + V) operations a head forward each, and backward 2.5 ×."""
    return sum(
        int(allowed_pairs(block, call.left, call.right, (0, block.q[1] - block.q[0]), torch.device("cpu")).sum())
        for stage in plan.stages
        for call in stage.calls
        for block in call.blocks
    )


def picture(plans: Sequence[AttentionPlan], total: int) -> str:
    """One line per query and one sign per key: the stage that computes the pair (0 to 9, a to z), or a dot."""
    found = torch.stack([stage_of_pairs(plan, total) for plan in plans])
    if ((found >= 0).sum(0) > 1).any():
        raise ValueError("two ring positions compute the same pair")
    return "\n".join("".join(_DIGITS[x % 36] if x >= 0 else "." for x in row) for row in found.amax(0).tolist())


def _indices(spans: Sequence[Range]) -> Tensor:
    return torch.cat([torch.arange(0), *(torch.arange(*span) for span in spans)])
