"""Gradients out of a flash kernel's float32 accumulators, as one Triton kernel. Imported only where triton is.

Such a kernel adds up a gradient in tiles of `tile` rows of `padded` >= D numbers, in the order of its registers. Every
sequence starts a tile of its own: sequence b at tile `(cu[b] + b * tile) // tile`.
Legend: n rows, H heads, D head dim.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ringattn.kernels.movement.launch import launch, power_of_two
from ringattn.kernels.spec import Sum

ROWS = 16  # of a program: with 128 numbers a row and 4 warps every thread moves 16


class Tiles(NamedTuple):
    """Where the numbers of an accumulator are."""

    order: Tensor  # (tile, D) int32: place of each number inside of its tile
    padded: int  # numbers a row, so `tile * padded` a tile
    cluster: int = 1  # sequences start at multiples of this many tiles


class Lengths(NamedTuple):
    cu: Tensor  # (B + 1,) int32: first row of each sequence
    used: Tensor | None = None  # (B,) int32: rows of each that there are; None: all to the next


def unpack_into(accum: Tensor, tiles: Tiles, lengths: Lengths, scale: float, target: Tensor, total: Sum) -> None:
    """Bring the rows of `accum * scale` that `total` has home to it, and write the others to `target`, rounded.

    Arguments:
        accum: (H, tiles * tile * padded) float32.
        target: (n, H, D) of any precision; rows of no sequence are left alone.
        total: (rows, H, D) float32; fresh, they are written, else added to.
    """
    tile, dim = tiles.order.shape
    size, wide = tile * tiles.padded, total.wide
    launch(
        _unpack,
        (accum.shape[1] // size * -(-tile // ROWS), target.shape[1]),
        (accum, tiles.order, target, wide, lengths.cu, lengths.cu if lengths.used is None else lengths.used),
        (lengths.cu.shape[0] - 1, *total.rows, accum.stride(0)),
        (float(scale), target.stride(0), target.stride(1), wide.stride(0), wide.stride(1)),
        (tile, tiles.padded, tile * tiles.cluster, dim, power_of_two(dim), ROWS, lengths.used is not None, total.fresh),
    )


@triton.jit(do_not_specialize=["sequences", "first", "last", "accum_head"])
def _unpack(
    accum, order, target, wide, cu, used,
    sequences, first, last, accum_head,
    scale, target_row, target_head, wide_row, wide_head,
    TILE: tl.constexpr, PADDED: tl.constexpr, START: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, USED: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = (TILE + ROWS - 1) // ROWS
    tile = tl.program_id(0) // PARTS
    head = tl.program_id(1).to(tl.int64)
    begin = tile * TILE
    low = 0
    high = sequences - 1
    while low < high:  # the last sequence that starts at or before this tile
        middle = (low + high + 1) // 2
        reached = (tl.load(cu + middle) + middle * START) // START * START <= begin
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    start = tl.load(cu + low)
    length = tl.load(used + low) if USED else tl.load(cu + low + 1) - start
    inner = tl.program_id(0) % PARTS * ROWS + tl.arange(0, ROWS)
    row = begin - (start + low * START) // START * START + inner
    inside = (inner < TILE) & (row < length)
    cols = tl.arange(0, WIDTH)
    elements = inside[:, None] & (cols < DIM)[None, :]
    at = tl.load(order + inner[:, None] * DIM + cols[None, :], mask=elements, other=0)
    base = accum + head * accum_head + begin.to(tl.int64) * PADDED
    part = tl.load(base + at, mask=elements, other=0.0) * scale

    out = (start + row).to(tl.int64)
    summed = (out >= first) & (out < last)
    wide_at = wide + (out - first)[:, None] * wide_row + head * wide_head + cols[None, :]
    added = elements & summed[:, None]
    if FRESH:
        tl.store(wide_at, part, mask=added)
    else:
        tl.store(wide_at, tl.load(wide_at, mask=added, other=0.0) + part, mask=added)
    target_at = target + out[:, None] * target_row + head * target_head + cols[None, :]
    tl.store(target_at, part, mask=elements & (out < first)[:, None])
    tl.store(target_at, part, mask=elements & (out >= last)[:, None])
