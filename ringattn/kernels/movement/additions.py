"""Which rows of received gradients are added to which, in what order, as tables that kernels read."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ringattn.kept import kept, kept_already
from ringattn.kernels.spec import Range, to_device

Pair = tuple[Tensor, Tensor]  # two tensors whose rows travel together, such as keys and values

TILE = 16  # rows that one program adds up


class Addition(NamedTuple):
    """Rows `target` of a sum get as many rows from `source` on: of the message if `remote`, else of the local pair."""

    target: Range
    source: int
    remote: bool


@dataclass(frozen=True)
class Additions:
    """What is added to which rows; the targets may overlap. The order never changes, so that sums are equal to the bit
    from run to run."""

    parts: tuple[Addition, ...]

    @cached_property
    def segments(self) -> list[tuple[Range, list[Addition]]]:
        """The target rows cut where the parts that meet there change, and those parts, in order."""
        bounds = sorted({bound for part in self.parts for bound in part.target})
        place = {bound: number for number, bound in enumerate(bounds)}
        meeting: list[list[Addition]] = [[] for _ in bounds]
        for part in self.parts:
            for number in range(place[part.target[0]], place[part.target[1]]):
                meeting[number].append(part)
        spans = zip(pairwise(bounds), meeting, strict=False)
        return [(span, parts) for span, parts in spans if parts]

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """For the fused kernel, int32 on `device`, made once.

        Returns tiles (n, 5): first row, rows, offset in the segment, first and last source; sources (m, 2): the row
        that belongs to the segment's first, and whether it is remote.
        """
        found: tuple[Tensor, Tensor] | None = kept_already(self, device)  # nothing else is kept here
        return kept(self, device, lambda: self._made_tables(device)) if found is None else found

    def _made_tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        tiles, sources = self._host_tables()
        return to_device(torch.from_numpy(tiles), device), to_device(torch.from_numpy(sources), device)

    def _host_tables(self) -> tuple[Any, Any]:
        tiles: list[Any] = []
        sources: list[tuple[int, int]] = []
        for (start, stop), parts in self.segments:
            begin = len(sources)
            sources += [(part.source + start - part.target[0], int(part.remote)) for part in parts]
            offsets = np.arange(0, stop - start, TILE)
            table = np.empty((len(offsets), 5), dtype=np.int32)
            table[:, 0], table[:, 1] = start + offsets, np.minimum(stop - start - offsets, TILE)
            table[:, 2], table[:, 3], table[:, 4] = offsets, begin, len(sources)
            tiles.append(table)
        empty = np.empty((0, 5), dtype=np.int32)
        return np.concatenate([empty, *tiles]), np.array(sources, dtype=np.int32).reshape(-1, 2)
