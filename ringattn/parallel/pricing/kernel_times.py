"""What the kernels of a schedule take at every ring position, with the merges of what they leave; in closed forms.

A gather's pairs are counted exactly, and its calls as far as they do not depend on the order of rows. Inside the later
stages of a ring the work of a position is spread in proportion to the rows that arrive.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ringattn.kernels.spec import Call
from ringattn.parallel.geometry.block_table import BlockTable, Floats, Ints
from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.schedules.demand import KeyDemand, per

# Seconds of the local stage, (positions), and of each later one, (stages, positions); forward and backward.
Kernels = list[tuple[Floats, Floats]]


@dataclass(frozen=True)
class KernelTimes:
    """Seconds of kernels; what the schedules share is computed once.

    Arguments:
        own: what a rank computes at a time: a chunk of its share of the heads.
    """

    demand: KeyDemand
    machine: Machine
    own: Shape

    def _seconds(self, table: BlockTable, ordinal: Ints, position: Ints) -> tuple[Floats, Floats]:
        """Seconds of calls in both directions, (ordinals, positions): a block is in the call of its ordinal and
        position."""
        positions = self.demand.positions
        most = int(ordinal.max(initial=0)) + 1
        table = replace(table, call=ordinal * positions + position, calls=most * positions)
        forward, backward = (calls_seconds(self.machine, table, self.own, backward) for backward in (False, True))
        return forward.reshape(most, positions), backward.reshape(most, positions)

    @cached_property
    def gathered(self) -> Kernels:
        """A gather: the pieces that are local are one call, the others over all their keys are in the later stage."""
        demand = self.demand.parted
        ordinal = demand.gathered_ordinal
        return [
            (one[0], one[1:].sum(0)[None]) for one in self._seconds(demand.gathered_blocks, ordinal, demand.position)
        ]

    @cached_property
    def _own_keys(self) -> tuple[list[Floats], Floats]:
        """Kernels over the keys of the position itself in both directions; and the pairs that each piece has left."""
        blocks, query, key = self.demand.own_blocks
        ordinal, position = (query != key).astype(np.int64), self.demand.position[query]
        seconds = [one.sum(0) for one in self._seconds(blocks, ordinal, position)]
        # Local pieces, which most are, have no pairs left.
        left = np.zeros(len(self.demand.first))
        some, of_some = ~self.demand.local, ~self.demand.local[query]
        done = per(query[of_some], blocks.where(of_some).areas, len(left))
        left[some] = np.maximum(self.demand.gathered_blocks.where(some).areas - done[some], 0)
        return seconds, left

    def staged(self, arriving: Ints) -> Kernels:
        """Kernels and merges of a ring (or of one position), of which rows (stages, position) arrive.

        The later stages of a position to which rows come are taken as alike but for the rows: each piece over an equal
        share of the pairs that it has left.
        """
        stages = np.maximum((arriving > 0).sum(0), 1)
        # In packs most positions hear from one or two others, however many stages there are.
        key = tuple(stages.tolist())
        if key not in self._kept:
            self._kept[key] = self._means(stages)
        total = np.maximum(arriving.sum(0), 1)
        return [(local, mean * arriving * stages / total) for local, mean in self._kept[key]]

    @cached_property
    def _kept(self) -> dict[tuple[int, ...], Kernels]:
        """What `_means` found."""
        return {}

    def _means(self, stages: Ints) -> Kernels:
        """Kernels and merges of the local stage, and of the mean of so many later ones of each position."""
        demand, own, machine = self.demand, self.own, self.machine
        own_keys, left = self._own_keys
        some = left > 0
        rows, position = (demand.last - demand.first)[some], demand.position[some]
        keys = np.ceil(left[some] / stages[position] / rows).astype(np.int64)
        open_side = np.full(len(rows), -1)
        table = BlockTable(rows, keys, open_side, open_side, open_side, 1)
        merged = per(position, rows, demand.positions)
        out = []
        kernels = self._seconds(table, demand.ordinal[some], position)
        for local, later, dim in zip(own_keys, kernels, (own.value_dim, own.head_dim), strict=True):
            per_row = own.query_heads * dim * (2 * own.wide + own.itemsize) / machine.merge_bandwidth
            mean = later.sum(0) + linear(merged, 2 * machine.copy_seconds, per_row)
            out.append((local + linear(demand.cut_rows, 2 * machine.copy_seconds, per_row), mean))
        return out


def linear(rows: Any, fixed: float, per_row: float) -> Any:
    """`fixed + rows * per_row`, and nothing for nothing."""
    return np.where(rows > 0, fixed + rows * per_row, 0.0)


def call_seconds(machine: Machine, call: Call, shape: Shape, backward: bool) -> float:
    """One kernel launch; `shape` is of the rank that computes it (`Shape.share`)."""
    return float(calls_seconds(machine, BlockTable.of([call]), shape, backward)[0])


def calls_seconds(machine: Machine, blocks: BlockTable, shape: Shape, backward: bool) -> Any:
    """Seconds of each call of a table, as an array."""
    rate = machine.rate(max(shape.head_dim, shape.value_dim), backward)
    return rate.seconds(blocks, shape.query_heads, shape.head_dim + shape.value_dim)
