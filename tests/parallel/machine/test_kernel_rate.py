"""Kernel rates against tiles counted one by one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn.kernels.backends.reference import allowed_pairs
from ringattn.kernels.spec import Block, Call
from ringattn.parallel.geometry.block_table import BlockTable, area
from ringattn.parallel.machine.kernel_rate import KernelRate

UNIT = KernelRate(64, False, flops=1.0, query_tile=4, key_tile=3, units=1)


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    n, m = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    left, right = (draw(st.sampled_from([-1, 0, 1, 5, 40])) for _ in range(2))
    return Block((0, n), (0, m), left, right)


def pairs(block: Block) -> torch.Tensor:
    rows = block.q[1] - block.q[0]
    return allowed_pairs(block, block.left, block.right, (0, rows), torch.device("cpu"))


@settings(max_examples=200)
@given(block=blocks())
def test_area_is_the_number_of_allowed_pairs(block: Block) -> None:
    assert area(block) == int(pairs(block).sum())


def visited(allowed: torch.Tensor, tile: int, other: int) -> list[int]:
    """For each tile of rows, from the first to the last tile of the other side with an allowed pair."""
    counts = []
    for start in range(0, allowed.shape[0], tile):
        keys = allowed[start : start + tile].any(0).nonzero().flatten()
        counts.append(int(keys[-1]) // other - int(keys[0]) // other + 1 if len(keys) else 0)
    return counts


@settings(max_examples=200)
@given(block=blocks(), backward=st.booleans(), heads=st.integers(1, 5))
def test_time_is_that_of_the_tiles(block: Block, backward: bool, heads: int) -> None:
    rate = replace(UNIT, backward=backward, units=2, tile_seconds=7.0, tail=0.5, launch_seconds=100.0)
    allowed = pairs(block)
    tiles = visited(allowed.T, 3, 4) if backward else visited(allowed, 4, 3)
    step = 2 * 12 * 10 * (2.5 if backward else 1) * 2  # flops of a tile on one of two units
    work = [7.0 + step * count for count in tiles]
    expected = 100 + max(max(work), sum(work) * heads / 2 + 0.5 * max(work))
    call = Call((block,), block.left, block.right)
    assert rate.seconds(BlockTable.of([call]), heads, 10)[0] == pytest.approx(expected)


def test_many_tiles_are_sampled_closely() -> None:
    call = Call((Block((0, 100_000), (0, 100_000)),), -1, 0)
    counted = sum(range(1, 25_001))  # square tiles: tile i visits i + 1
    rate = replace(UNIT, key_tile=4)
    assert rate.seconds(BlockTable.of([call]), 1, 1)[0] == pytest.approx(counted * 32, rel=1e-3)


def test_a_call_without_blocks_and_a_rank_without_heads_cost_nothing() -> None:
    empty = np.zeros(0, dtype=np.int64)
    table = BlockTable(empty, empty, empty, empty, empty, 3)
    assert replace(UNIT, launch_seconds=5.0).seconds(table, 4, 1).tolist() == [0, 0, 0]
    one = BlockTable.of([Call((Block((0, 3), (0, 3)),), -1, 0)])
    assert replace(UNIT, launch_seconds=5.0).seconds(one, 0, 1).tolist() == [0]
