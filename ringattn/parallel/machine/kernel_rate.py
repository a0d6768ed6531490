"""How long a flash kernel takes for a call: a model of its tiles, with a handful of measured numbers.

A kernel cuts the rows of every block in tiles and gives each (tile, head) to a unit of the device (a GPU's SM), which
walks over the tiles of the other side that the mask leaves. So a call costs the launch, and then the work of all tiles
shared by the units, or the longest single tile if that is more. A tile that is not full costs as much as a full one and
each has a fixed cost: so short documents are slow, and so are calls with fewer tiles than units.
Forward kernels tile the queries and walk over keys; backward kernels tile the keys and walk over queries.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ringattn.parallel.geometry.block_table import BlockTable, Floats, Ints

SAMPLES = 64  # tiles of a block that are looked at
BACKWARD_FLOPS = 2.5  # five matrix products instead of two


@dataclass(frozen=True)
class KernelRate:
    """The numbers of one kernel at one head dim, in one direction.

    Arguments:
        flops: of the whole device on full tiles, per second.
        query_tile, key_tile: rows of a tile.
        units: what works in parallel.
        tile_seconds: fixed cost of one tile of one head on its unit.
        tail: share of the longest tile for which the other units wait at the end.
        launch_seconds: fixed cost of a call.
        row_seconds: per query row and query head of a call, for passes over the rows beside the tiles (backward).
        document_seconds: fixed cost of each block of a call, where a kernel loops over them.
    """

    head_dim: int
    backward: bool
    flops: float
    query_tile: int = 128
    key_tile: int = 128
    units: int = 132
    tile_seconds: float = 0.0
    tail: float = 0.0
    launch_seconds: float = 0.0
    row_seconds: float = 0.0
    document_seconds: float = 0.0

    def share_seconds(self, blocks: "BlockTable", dims: int) -> Floats:
        """Seconds of each block of a table per head, as its share of a device that is full: no launch, no tail."""
        return self._work(blocks, dims)[0] / self.units + blocks.n * self.row_seconds

    def seconds(self, blocks: "BlockTable", heads: int, dims: int) -> Floats:
        """Seconds of every call of a table.

        Arguments:
            heads: query heads.
            dims: head dim and value dim together.
        """
        if not heads or not len(blocks.call):
            return np.zeros(blocks.calls)
        work, longest = self._work(blocks, dims)
        total = np.bincount(blocks.call, work, blocks.calls) * heads / self.units
        tail = np.zeros(blocks.calls)
        np.maximum.at(tail, blocks.call, longest)
        rows = np.bincount(blocks.call, blocks.n, blocks.calls) * heads * self.row_seconds
        count = np.bincount(blocks.call, minlength=blocks.calls)
        launch = np.where(count > 0, self.launch_seconds, 0.0) + count * self.document_seconds
        return launch + np.maximum(tail, total + self.tail * tail) + rows

    def _work(self, blocks: "BlockTable", dims: int) -> tuple[Floats, Floats]:
        """Seconds of one unit for all tiles of a block, and for the longest tile."""
        step = 2.0 * self.query_tile * self.key_tile * dims * (BACKWARD_FLOPS if self.backward else 1.0)
        step_seconds = step * self.units / self.flops
        n, m, left, right = blocks.n, blocks.m, blocks.left, blocks.right
        tile, other = self.query_tile, self.key_tile
        if self.backward:
            n, m, left, right, tile, other = m, n, right, left, other, tile
        work, longest = _walk(n, m, left, right, tile, other)
        fixed = np.where(n > 0, self.tile_seconds, 0.0)
        return -(-n // tile) * fixed + work * step_seconds, fixed + longest * step_seconds

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _walk(n: Ints, m: Ints, left: Ints, right: Ints, tile: int, other: int) -> tuple[Floats, Ints]:
    """For blocks of n rows over m: how many tiles of the other side their tiles visit, in all and at most."""
    tiles = np.where(m > 0, -(-n // tile), 0)
    longest = -(-m // other) * (tiles > 0)
    total = (tiles * longest).astype(np.float64)
    left_open, right_open = left < 0, right < 0
    unbounded = left_open & right_open
    if not unbounded.all():
        # Most others are whole causal documents: the first tile visits one, the next two; or the other way around.
        triangle = (left_open & (right == 0)) | (right_open & (left == 0))
        triangle &= (n == m) & (tiles <= SAMPLES) & (tile == other)
        total[triangle] = (tiles * (tiles + 1) // 2)[triangle]
        some = np.flatnonzero(~(unbounded | triangle) & (tiles > 0))
        if len(some):
            total[some], longest[some] = _sampled_walk(n[some], m[some], left[some], right[some], tile, other)
    return total, longest


def _sampled_walk(n: Ints, m: Ints, left: Ints, right: Ints, tile: int, other: int) -> tuple[Floats, Ints]:
    """`_walk` tile by tile, for blocks of which none is empty.

    Of many tiles some are counted, at equal distances: what a tile visits is linear in its place, but for a few bends.
    """
    # An open side sees as far as there are rows.
    left, right = np.where(left < 0, m, left), np.where(right < 0, n, right)
    tiles = -(-n // tile)
    counts = np.minimum(tiles, SAMPLES)
    begins = np.cumsum(counts) - counts
    index = np.repeat(np.arange(len(n)), counts)
    sample = np.arange(len(index)) - begins[index]
    first = (2 * sample + 1) * tiles[index] // (2 * counts[index]) * tile
    last = np.minimum(first + tile, n[index])
    lower = np.maximum(first + (m - n - left)[index], 0)
    upper = np.minimum(last + (m - n + right)[index], m[index])
    visited = np.maximum(-(-upper // other) - lower // other, 0)
    return np.add.reduceat(visited, begins) * tiles / counts, np.maximum.reduceat(visited, begins)
