"""Sums of partial results, in float32 and in a fixed order."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ringattn.kernels.spec import Range, Sum, accumulation_dtype
from ringattn.parallel.geometry.ranges import overlap


def view_rows(x: Tensor, rows: Range) -> Tensor:
    """A range of the rows of x: x itself where it is all, since a view costs the host as much as a launch."""
    return x if rows == (0, x.shape[0]) else x[rows[0] : rows[1]]


class Accumulator:
    """A result of n rows of which those in `shared` have several parts, added in float32.

    Kernels write every part to `rows` in place. Rows outside `shared` have one part and are final then; `collect` adds
    a part of the others to the wide copy, and `finish` rounds them once. Rows in `untouched` get no part: they are 0.
    With `fresh` every row has one part, of a call or of another rank, also those in `shared`: it is written over what
    was there and not added, so that there need be no zeros first.
    """

    def __init__(self, rows: Tensor, shared: Range, untouched: Sequence[Range], fresh: bool = False) -> None:
        self.rows = rows
        self.shared = shared
        self.fresh = fresh
        self.wide: Tensor | None = None
        if shared[0] < shared[1]:
            size = shared[1] - shared[0], *rows.shape[1:]
            self.wide = (rows.new_empty if fresh else rows.new_zeros)(size, dtype=accumulation_dtype(rows.dtype))
        for start, stop in untouched:
            rows[start:stop] = 0
            a, b = self.inside((start, stop))
            if fresh and a < b:
                self.wide_rows(a, b).zero_()

    def inside(self, span: Range) -> Range:
        """The shared part of a range (empty: start >= stop)."""
        return overlap(span, self.shared)

    def outside(self, span: Range) -> list[Range]:
        """What is left of a range without its shared part."""
        a, b = self.inside(span)
        parts = [(span[0], a), (b, span[1])] if a < b else [span]
        return [part for part in parts if part[0] < part[1]]

    def wide_rows(self, start: int, stop: int) -> Tensor:
        """The sums of rows `[start, stop)`, all of them shared."""
        assert self.wide is not None
        return view_rows(self.wide, (start - self.shared[0], stop - self.shared[0]))

    def sum(self, span: Range) -> Sum | None:
        """Where a kernel that adds leaves its part of the rows `span`, or None if none of them is shared."""
        a, b = self.inside(span)
        return Sum((a - span[0], b - span[0]), self.wide_rows(a, b), self.fresh) if a < b else None

    def collect(self, span: Range) -> None:
        """Add the part that lies in `rows[span]`."""
        a, b = self.inside(span)
        if a < b:
            assert not self.fresh, "only kernels that add write sums"
            self.wide_rows(a, b).add_(self.rows[a:b])

    @property
    def home(self) -> tuple[Tensor, int]:
        """The tensor to which rows are added that come back from other ranks, and the row that it begins with."""
        return (self.rows, 0) if self.wide is None else (self.wide, self.shared[0])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which parts are added."""
        return accumulation_dtype(self.rows.dtype)

    def sums(self) -> Tensor:
        """All rows in the dtype of the sums, those that are sums before they are rounded."""
        if self.wide is None:
            return self.rows.to(self.dtype)
        if self.shared == (0, len(self.rows)):
            return self.wide
        out = self.rows.to(self.dtype)
        out[slice(*self.shared)] = self.wide
        return out

    @property
    def total(self) -> Tensor:
        """All rows as they were added up; only where all of them are shared, or none."""
        assert self.wide is None or self.shared == (0, len(self.rows))
        return self.rows if self.wide is None else self.wide

    def finish(self) -> Tensor:
        """All rows, with those that are sums rounded."""
        if self.wide is not None:
            self.rows[slice(*self.shared)] = self.wide
        return self.rows
