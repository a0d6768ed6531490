"""What makes tokens expensive: the cost that a placement evens out."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ringattn.mask import Mask
from ringattn.parallel.geometry.block_table import BlockTable, Floats, Ints
from ringattn.parallel.machine.kernel_rate import KernelRate


@dataclass(frozen=True)
class Load:
    """What makes tokens expensive.

    Arguments:
        masks: masks of a model with the number of layers that each has: their costs are added.
        rates: kernels of the forward and of the backward pass, if time is to be balanced; without, the number of
            allowed pairs.
        dims: head dim and value dim together, which rates need.
    """

    masks: tuple[tuple[Mask, float], ...]
    rates: tuple[KernelRate, ...] = ()
    dims: int = 256

    @property
    def chunk(self) -> int | None:
        """The chunk that all masks have, if they have one: then chunks are documents of their own."""
        chunks = {mask.chunk for mask, _ in self.masks}
        return chunks.pop() if len(chunks) == 1 else None

    def costs(self, sizes: Ints) -> Floats:
        """Cost of whole documents of these lengths."""
        total = np.zeros(len(sizes))
        for mask, layers in self.masks:
            if mask.chunk is None:
                total += layers * self._cost(sizes, mask)
            else:
                chunk = self._cost(np.array([mask.chunk]), mask)[0]
                total += layers * (chunk * (sizes // mask.chunk) + self._cost(sizes % mask.chunk, mask))
        return total

    def _cost(self, sizes: Ints, mask: Mask) -> Floats:
        """Cost of whole documents under the band of one mask."""
        left, right = (-1 if side is None else abs(side) for side in (mask.band.lo, mask.band.hi))
        open_side = np.zeros_like(sizes)
        return self.table_costs(BlockTable(sizes, sizes, open_side + left, open_side + right, open_side, 1))

    def table_costs(self, table: BlockTable) -> Floats:
        """Cost of each block of a table, in one layer."""
        if not self.rates:
            return table.areas.astype(np.float64)
        return sum((rate.share_seconds(table, self.dims) for rate in self.rates), np.zeros(len(table.n)))

    @cached_property
    def bent(self) -> bool:
        """Whether some layers of causal ones have chunks and others have not, or other ones: a document that is cut
        costs neither what its tokens do on the mean, as whole chunks would, nor what nested heads and tails would."""
        chunks = {mask.chunk for mask, _ in self.masks}
        return len(chunks) > 1 and all(mask.band.hi == 0 for mask, _ in self.masks)

    @cached_property
    def looks_ahead(self) -> bool:
        """Whether queries of some layers see keys after them: the last tokens of a document may then cost less too."""
        return any(mask.band.hi != 0 for mask, _ in self.masks)

    def nested(self, size: int) -> bool:
        """Whether a document is best cut in nested heads and tails.

        A window or chunk shorter than half the document makes cost per token flat: then few cuts matter more.
        """
        return size <= 2 * self._reach

    def pairs_of(self, position: int, size: int) -> float:
        """What the queries before a position of a document see under any masks, summed over layers."""
        total = 0.0
        for mask, layers in self.masks:
            chunk = mask.chunk or size
            whole, rest = divmod(position, chunk)
            last = min(chunk, size - whole * chunk)
            total += layers * (whole * mask.band.area(0, chunk, chunk) + mask.band.area(0, rest, last))
        return total

    def pairs_before(self, positions: Ints) -> Floats:
        """What the queries before positions of a document see under causal windows, summed over layers."""
        total = np.zeros(len(positions))
        for layers, width in self._windows:
            inside = np.minimum(positions, width)
            beyond = positions - inside  # none where there is no window, whose width is infinite
            total += layers * (inside * (inside + 1) / 2 + (width * beyond if beyond.any() else 0.0))
        return total

    def ramp(self, size: int) -> float:
        """By how much less than elsewhere the first queries of a document cost that see less than a window, as part of
        what all do; 0 where windows are none, or wider than the document. With layers that look ahead by how much less
        than the dearest all others do."""
        if self.looks_ahead:
            return self._dearest(size) * size / self.pairs_of(size, size) - 1
        narrow = sum(layers * width * width / 2 for layers, width in self._windows if width < size)
        return narrow / float(self.pairs_before(np.array([size]))[0]) if narrow else 0.0

    def _dearest(self, size: int) -> float:
        """What the query that sees most in a document sees at most, summed over layers."""
        total = 0.0
        for mask, layers in self.masks:
            whole = min(size, mask.chunk or size)
            sides = (whole if side is None else abs(side) for side in (mask.band.lo, mask.band.hi))
            total += layers * min(whole, 1 + sum(sides))
        return total

    @cached_property
    def _windows(self) -> tuple[tuple[float, float], ...]:
        """Layers and widths of causal windows; none if any mask is another one."""
        bands = [(layers, mask.band) for mask, layers in self.masks]
        if any(band.hi != 0 for _, band in bands) or (self.chunk is None and any(mask.chunk for mask, _ in self.masks)):
            return ()
        return tuple((layers, math.inf if band.lo is None else 1.0 - band.lo) for layers, band in bands)

    @cached_property
    def _reach(self) -> float:
        """How far back queries of a causal mask see, of the one whose see farthest; negative without such a mask."""
        reaches = [
            min(math.inf if mask.band.lo is None else -mask.band.lo, mask.chunk or math.inf)
            for mask, _ in self.masks
            if mask.band.hi == 0
        ]
        return max(reaches, default=-math.inf)
