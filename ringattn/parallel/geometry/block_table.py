"""Blocks as columns of integers, for arithmetic over all ranks at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ringattn.kernels.spec import Block, Call
from ringattn.mask import Band

Ints = npt.NDArray[np.int64]


Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class BlockTable:
    """Blocks of one or many calls as columns: n query rows over m keys, `left` and `right` as in `Block` (-1 is open).

    `call` is the number of each block's call, in `[0, calls)`.
    """

    n: Ints
    m: Ints
    left: Ints
    right: Ints
    call: Ints
    calls: int

    @classmethod
    def of(cls, calls: Sequence[Call]) -> "BlockTable":
        """The blocks of some calls; each call's band holds for its blocks."""
        rows = [
            (block.q[1] - block.q[0], block.k[1] - block.k[0], call.left, call.right, number)
            for number, call in enumerate(calls)
            for block in call.blocks
        ]
        n, m, left, right, call = np.array(rows, dtype=np.int64).reshape(-1, 5).T
        return cls(n, m, left, right, call, len(calls))

    @classmethod
    def cut(cls, first: Ints, last: Ints, k_first: Ints, k_last: Ints, band: Band) -> "BlockTable":
        """Queries `[first, last)` over keys `[k_first, k_last)` of documents, cut as `blocks.blocks_of` does; one call.

        Queries that see none of the keys are left out.
        """
        if band.hi is not None:
            first = np.maximum(first, k_first - band.hi)
        if band.lo is not None:
            last = np.minimum(last, k_last - band.lo)
        n, m = last - first, k_last - k_first
        left = right = np.full_like(n, -1)
        if band.hi is not None:
            right = np.where(band.hi + last - k_last >= n - 1, -1, band.hi + last - k_last)
        if band.lo is not None:
            left = np.where(k_last - last - band.lo >= m - 1, -1, k_last - last - band.lo)
        return cls(n, m, left, right, np.zeros_like(n), 1)

    def where(self, mask: npt.NDArray[np.bool_]) -> "BlockTable":
        """Some of the blocks."""
        n, m, left, right, call = (column[mask] for column in (self.n, self.m, self.left, self.right, self.call))
        return BlockTable(n, m, left, right, call, self.calls)

    @property
    def areas(self) -> Ints:
        """Allowed pairs of each block."""
        return _areas(self.n, self.m, self.left, self.right)


def area(block: Block) -> int:
    """Allowed pairs of a block."""
    return int(BlockTable.of([Call((block,), block.left, block.right)]).areas[0])


def needs(first: Ints, last: Ints, length: Ints, band: Band) -> tuple[Ints, Ints]:
    """The keys that the queries `[first, last)` of documents of `length` see (`Band.keys_of`)."""
    lo = np.zeros_like(first) if band.lo is None else np.maximum(first + band.lo, 0)
    hi = length if band.hi is None else np.minimum(last + band.hi, length)
    return lo, hi


def _areas(n: Ints, m: Ints, left: Ints, right: Ints) -> Ints:
    """Sum over queries i of the keys between `max(0, i + m - n - left)` and `min(m, i + m - n + right + 1)`."""
    start = m - n

    def clipped(offset: Ints) -> Ints:
        """Sum over i of `clip(i + offset, 0, m)`."""
        low = np.clip(-offset, 0, n)  # queries before this one see 0
        high = np.clip(m - offset, low, n)  # from this one on they see m
        return (low + high - 1 + 2 * offset) * (high - low) // 2 + (n - high) * m

    upper = np.where(right < 0, n * m, clipped(start + right + 1))
    lower = np.where(left < 0, 0, clipped(start - left))
    return np.maximum(upper - lower, 0)
