"""Which entries of a tile's logits are targets, and how much each counts: one a row, or any number.

Legend: t tokens, n rows of a tile, m targets of a tile, V words.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ringattn.kernels.call import to_device
from ringattn.trees.targets import Targets

IGNORE_INDEX = -100

Rows = Tensor | slice


class Picks(Protocol):
    """The targets of a tile. Values of targets are (n, 1) where each row has one, else (m,)."""

    @property
    def rows(self) -> Rows:
        """Which n rows of the hidden states."""

    @property
    def weights(self) -> Tensor:
        """How much each target counts."""

    def of(self, table: Tensor) -> Tensor:
        """(n, V) -> the entries of the targets."""

    def by_row(self, values: Tensor) -> Tensor:
        """Values of targets -> (n, 1), added up in each row."""

    def subtract(self, table: Tensor, values: Tensor) -> None:
        """Takes values of targets from their entries of (n, V)."""


class OneEach:
    """Every row has one target, or -100, which counts nothing."""

    def __init__(self, rows: Rows, targets: Tensor, wide: torch.dtype) -> None:
        labels = targets[rows]
        self.rows: Rows = rows
        self._labels = labels.clamp_min(0)[:, None]
        self.weights = (labels != IGNORE_INDEX).to(wide)[:, None]

    def of(self, table: Tensor) -> Tensor:
        return table.gather(1, self._labels)

    def by_row(self, values: Tensor) -> Tensor:
        return values

    def subtract(self, table: Tensor, values: Tensor) -> None:
        table.scatter_add_(1, self._labels, -values)


class Several:
    """Rows with any number of targets.

    Arguments:
        rows: (n,).
        at: (m,) in which of them each target is.
        labels, weights: (m,).
    """

    def __init__(self, rows: Tensor, at: Tensor, labels: Tensor, weights: Tensor) -> None:
        self.rows, self._at, self._labels, self.weights = rows, at, labels, weights

    def of(self, table: Tensor) -> Tensor:
        return table[self._at, self._labels]

    def by_row(self, values: Tensor) -> Tensor:
        return values.new_zeros(len(self.rows)).index_add_(0, self._at, values)[:, None]

    def subtract(self, table: Tensor, values: Tensor) -> None:
        table.index_put_((self._at, self._labels), -values, accumulate=True)


def one_each(targets: Tensor, tile: int, count: int | None, wide: torch.dtype) -> Iterator[OneEach]:
    """Tiles of the rows that have a target, or while a CUDA graph is captured, which must not wait, of all.

    Arguments:
        targets: (t,), -100 for none.
        count: how many are not -100; None waits for the device to count them.
    """
    rows: list[Rows] = [slice(first, first + tile) for first in range(0, len(targets), tile)]
    if not (targets.is_cuda and torch.cuda.is_current_stream_capturing()):
        known = targets != IGNORE_INDEX
        found = known.nonzero() if count is None else torch.nonzero_static(known, size=count)
        if len(found) != len(targets):  # else they are views, not copies
            rows = list(found[:, 0].split(tile)) if len(found) else []
    return (OneEach(one, targets, wide) for one in rows)


class Triples:
    """Triples cut in tiles of rows on the host: a row's logits are made once, whatever its number of targets.

    Arguments:
        of: triples; only those in `wanted`, if given, (m,) booleans.

    Attributes:
        order: (m',) which triples the tiles hold, in their order.
    """

    def __init__(self, of: Targets, tile: int, wanted: Tensor | None = None) -> None:
        chosen = np.arange(len(of)) if wanted is None else wanted.nonzero()[:, 0].numpy()
        rows = of.rows.numpy()[chosen]
        by_row = np.argsort(rows, kind="stable")
        self.order = torch.from_numpy(chosen[by_row])
        distinct, place = np.unique(rows[by_row], return_inverse=True)
        self._rows, self._at = torch.from_numpy(distinct), torch.from_numpy(place.astype(np.int64) % tile)
        self._labels, self._tile = of.labels[self.order], tile
        # Where in `order` each tile begins, and the end.
        bounds = [*range(0, len(distinct), tile), len(distinct)]
        self.bounds: list[int] = np.searchsorted(place, bounds).tolist()

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def tiles(self, weights: Tensor, device: torch.device) -> Iterator[Several]:
        """The tiles on a device.

        Arguments:
            weights: (m',) on it, in the tiles' order.
        """
        rows, at, labels = (to_device(x, device) for x in (self._rows, self._at, self._labels))
        for number in range(len(self)):
            inside = slice(self.bounds[number], self.bounds[number + 1])
            own = rows[number * self._tile : (number + 1) * self._tile]
            yield Several(own, at[inside], labels[inside], weights[inside])
