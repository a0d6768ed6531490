"""Ranges of integers `(start, stop)`: what many of them cover, leave open, or share."""

from collections.abc import Iterable
from itertools import pairwise

from ringattn.kernels.spec import Range


def union(spans: Iterable[Range]) -> list[Range]:
    """Everything that is covered, ascending, as few ranges as there are."""
    out: list[Range] = []
    for start, stop in sorted(span for span in spans if span[0] < span[1]):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], stop))
        else:
            out.append((start, stop))
    return out


def gaps(spans: Iterable[Range], rows: int) -> tuple[Range, ...]:
    """What of `[0, rows)` no range covers."""
    covered = [(0, 0), *union(spans), (rows, rows)]
    return tuple((a[1], b[0]) for a, b in pairwise(covered) if a[1] < b[0])


def touching(spans: Iterable[Range]) -> tuple[Range, ...]:
    """Consecutive ranges that continue one another made one; the order stays."""
    out: list[Range] = []
    for start, stop in spans:
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return tuple(out)


def overlap(a: Range, b: Range) -> Range:
    """What is in both (empty: start >= stop)."""
    return max(a[0], b[0]), min(a[1], b[1])


def length(spans: Iterable[Range]) -> int:
    return sum(stop - start for start, stop in spans)
