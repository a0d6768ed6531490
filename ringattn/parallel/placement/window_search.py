"""The window search: every position gets its share of the tokens at its share of the cost, with few spans cut.

Spans stand in the order of their cost per token. A window of a position's tokens costs the more the further it is, so
at one place it costs what the position shall: that is taken away, and the rest has the same average.
"""

from typing import NamedTuple

import numpy as np


class Span(NamedTuple):
    """A run of tokens whose cost is balanced as one: a document as attention sees it, or padding (no cost)."""

    start: int
    size: int
    cost: float
    density: float  # cost per token
    nested: bool  # cut in nested heads and tails; else in consecutive runs
    document: int | None = None  # whose cost per token neither grows evenly nor is that of a window
    plain: bool = True  # without segments and blocks


def rounded_rows(spans: list[Span], mean: float, coarsest: int) -> list[int]:
    """Rows that cuts of each span are rounded to, a power of two.

    Arguments:
        mean: cost of a token of the stream.
        coarsest: of spans that cost no more.
    """
    density = np.array([span.density or mean or 1.0 for span in spans])
    rows = np.maximum(1.0, coarsest * np.minimum(1.0, mean / density))
    return (1 << (np.frexp(rows)[1] - 1)).tolist()


def window_search(spans: list[Span], bounds: list[float], tiles: list[int]) -> list[list[tuple[int, int]]]:
    """Tokens of every span given to every position: per span, sorted by density, a list of `(position, tokens)`.

    Arguments:
        bounds: what all positions up to each shall have, of the last of them.
    """
    left = np.array([span.size for span in spans], dtype=np.int64)
    density = np.array([span.density for span in spans])
    tokens, cost = int(left.sum()), float((left * density).sum())
    shares: list[list[tuple[int, int]]] = [[] for _ in spans]
    given, given_cost = 0, 0.0
    for position, bound in enumerate(bounds):
        # What all positions so far shall have, less what they got: a rounding is made up for by the next position.
        want = int(bound * tokens // bounds[-1]) - given
        goal = bound * cost / bounds[-1] - given_cost
        taken = left if position == len(bounds) - 1 else _window(left, density, want, goal, tiles)
        owned = np.flatnonzero(taken)
        for index, share in zip(owned.tolist(), taken[owned].tolist(), strict=True):
            shares[index].append((position, share))
        left = left - taken
        given += int(taken.sum())
        given_cost += float((taken * density).sum())
    return shares


def _window(left: np.ndarray, density: np.ndarray, want: int, goal: float, tiles: list[int]) -> np.ndarray:
    """Tokens that a window of `want` tokens and cost `goal` takes from every span; `left` are those not given away."""
    if want <= 0:
        return np.zeros_like(left)
    ends = np.cumsum(left)
    begins = ends - left
    costs = np.concatenate([[0.0], np.cumsum(left * density)])

    def cost_before(token: int) -> float:
        # `item`: this is called 40 times a position, and numbers of Python are faster than those of numpy.
        index = int(ends.searchsorted(token))
        return costs.item(index) + (token - begins.item(index)) * density.item(index) if token else 0.0

    low, high = 0, int(ends[-1]) - want
    while low < high:
        middle = (low + high) // 2
        if cost_before(middle + want) - cost_before(middle) < goal:
            low = middle + 1
        else:
            high = middle
    return _rounded_window(left, ends, low, want, tiles)


def _rounded_window(left: np.ndarray, ends: np.ndarray, start: int, want: int, tiles: list[int]) -> np.ndarray:
    """The window `[start, start + want)` with what it takes from a cut span rounded to tiles.

    The end of the expensive rows is rounded first, and the other end makes up for the tokens.
    """
    first = int(np.searchsorted(ends, start, side="right"))
    last = int(np.searchsorted(ends, start + want, side="left"))
    taken = np.zeros_like(left)
    if first < last:
        taken[last] = _rounded(start + want - int(ends[last - 1]), int(left[last]), tiles[last])
        taken[first + 1 : last] = left[first + 1 : last]
        want -= int(taken.sum())
    taken[first] = _rounded(max(want, 0), int(left[first]), tiles[first])
    return taken


def _rounded(tokens: int, available: int, tile: int) -> int:
    """`tokens` to the nearest number of tiles, or all there is."""
    return min((tokens + tile // 2) // tile * tile, available) if tokens < available else available
