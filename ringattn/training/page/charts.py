"""Curves and bars as SVG. Colours are classes, so that the page's own light and dark colours hold for them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]
WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 36
MOST = 700  # points of a curve
SERIES = 6  # colours


@dataclass(frozen=True)
class Curve:
    """Points from left to right; `kind` is `raw` (thin and faint), `line`, or `dots` (a line with its points)."""

    name: str
    points: Sequence[Point]
    kind: str = "line"
    colour: int = 0


def chart(
    curves: Sequence[Curve],
    x_name: str,
    form: Callable[[float], str],
    marks: Sequence[float] = (),
    marked: str = "",
    from_zero: bool = False,
) -> str:
    """One picture of curves over the same axes, or nothing where no curve has a point.

    Arguments:
        form: writes a value of the vertical axis.
        marks: places on the horizontal axis that are marked at its foot; `marked` says what they are.
        from_zero: the vertical axis is linear and begins at 0. Otherwise it is logarithmic where values differ much.
    """
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    log = not from_zero and min(ys) > 0 and max(ys) / min(ys) > 100
    low = min(0.0, *ys) if from_zero else min(ys)
    across = Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    up = Axis(low, max(ys), HEIGHT - BOTTOM, TOP, log, margin=0.04)
    parts = [_grid(across, up, x_name, form)]
    for curve in curves:
        places = [(across(x), up(y)) for x, y in thinned(curve.points)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        colour = f"s{curve.colour % SERIES}"
        if len(places) > 1:
            parts.append(f'<polyline class="{curve.kind} {colour}" points="{line}"/>')
        if curve.kind == "dots" or len(places) == 1:
            parts += [f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
    foot = HEIGHT - BOTTOM
    parts += [f'<path class="mark" d="M{across(x):.1f} {foot}v-9"/>' for x in list(marks)[:MOST]]
    last = "; ".join(f"{curve.name} {form(curve.points[-1][1])}" for curve in curves if curve.kind != "raw")
    named = [(curve.name, f"{curve.kind} s{curve.colour % SERIES}") for curve in curves]
    named += [(marked, "mark")] if marks else []
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(last)}">{"".join(parts)}</svg>'
    return svg + (_legend(named) if len(named) > 1 else "")


class Axis:
    """Values to places of a picture."""

    def __init__(
        self, low: float, high: float, start: float, stop: float, log: bool = False, margin: float = 0.0
    ) -> None:
        self.log = log
        low, high = (math.log10(low), math.log10(high)) if log else (low, high)
        wide = (high - low) or max(abs(high), 1e-9) * 0.1
        if high == low:
            low, high = low - wide / 2, high + wide / 2
        self.low, self.high = low - margin * wide, high + margin * wide
        self.start, self.stop = start, stop

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self, count: int, whole: bool = False) -> list[float]:
        """Round values inside of the axis, about `count` of them."""
        if self.log:
            first, last = math.floor(self.low), math.ceil(self.high)
            every = max(1, (last - first) // count)
            factors = (1,) if last - first > 3 else (1, 2, 5)
            found = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
            return [tick for tick in found if self.low <= math.log10(tick) <= self.high]
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
        step = max(1.0, math.ceil(step)) if whole else step
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _grid(across: Axis, up: Axis, x_name: str, form: Callable[[float], str]) -> str:
    parts = []
    for tick in up.ticks(5):
        y = up(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y + 4:.1f}">{escape(form(tick))}</text>')
    foot = HEIGHT - BOTTOM
    for tick in across.ticks(5, whole=True):
        x = across(tick)
        anchor = "end" if x > WIDTH - RIGHT - 14 else "middle"
        parts.append(f'<path class="grid" d="M{x:.1f} {foot}v4"/>')
        parts.append(f'<text class="x" style="text-anchor:{anchor}" x="{x:.1f}" y="{foot + 17}">{short(tick)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {foot}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text class="name" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}">{escape(x_name)}</text>')
    return "".join(parts)


def _legend(named: Sequence[tuple[str, str]]) -> str:
    items = "".join(
        f'<li><svg viewBox="0 0 20 10"><path class="{look}" d="M1 5h18"/></svg>{escape(name)}</li>'
        for name, look in named
    )
    return f'<ul class="legend">{items}</ul>'


def bars(named: Sequence[tuple[str, float, str]], y_name: str, form: Callable[[float], str]) -> str:
    """Bars beside each other: (name below it, height, what the mouse tells)."""
    if not named or max(height for _, height, _ in named) <= 0:
        return ""
    up = Axis(0, max(height for _, height, _ in named) * 1.03, HEIGHT - BOTTOM, TOP)
    wide = (WIDTH - LEFT - RIGHT) / len(named)
    every = math.ceil(len(named) / 9)
    parts = []
    for tick in up.ticks(5):
        y = up(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y + 4:.1f}">{escape(form(tick))}</text>')
    for number, (name, height, told) in enumerate(named):
        x, y = LEFT + number * wide, up(height)
        parts.append(
            f'<rect class="s0" x="{x + 1:.1f}" y="{y:.1f}" width="{max(1.0, wide - 2):.1f}" '
            f'height="{HEIGHT - BOTTOM - y:.1f}"><title>{escape(told)}</title></rect>'
        )
        if number % every == 0:
            parts.append(f'<text class="x" x="{x + wide / 2:.1f}" y="{HEIGHT - BOTTOM + 17}">{escape(name)}</text>')
    parts.append(f'<text class="name" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}">{escape(y_name)}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_name)}">{"".join(parts)}</svg>'


def thinned(points: Sequence[Point], most: int = MOST) -> list[Point]:
    """At most so many points: of each run of neighbours the lowest and the highest, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    found: list[Point] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        found += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return found


def short(value: float) -> str:
    """A number in few signs: 1,200 as 1.2K."""
    size = abs(value)
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if size >= unit:
            return f"{value / unit:.3g}{name}"
    if 0 < size < 1e-3:
        digits, _, power = f"{value:.3e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.3g}"


def binary(value: float) -> str:
    """A length in tokens, in powers of two: 4,096 as 4K."""
    for unit, name in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"
