"""The kernels of `rows.py` in Triton. Imported only where triton is.

A program moves some columns of some rows. Where the columns of the pair's two tensors divide by that width, all of a
program's are of one tensor, and it loads from one place; else it loads from both under masks.
"""

from functools import cache
from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from ringattn.kernels.movement.additions import TILE, Pair
from ringattn.kernels.movement.launch import launch, power_of_two

WIDTH = 512  # most columns of a program
NARROW = 32  # with fewer it is better to load from both tensors


@cache
def _width(first: int, both: int) -> tuple[int, bool]:
    """Columns of a program, and whether they are of one tensor."""
    common = gcd(first, both) & -gcd(first, both)  # the largest power of two that divides both
    if common >= NARROW:
        return min(WIDTH, common), True
    return min(WIDTH, power_of_two(both)), False


def take_rows(index: Tensor, target: Tensor, message: Tensor | None, pair: Pair) -> None:
    """See `rows.take_rows`; message and pair have one dtype."""
    first, second = pair
    source = first if message is None else message
    assert source.dtype == first.dtype == second.dtype
    rows, columns, both = index.shape[0], first.shape[1], target.shape[1]
    width, split = _width(columns, both)
    launch(
        _take,
        (-(-rows // TILE), -(-both // width)),
        (index, target, source, first, second),
        (rows, 0 if message is None else message.shape[0]),
        (target.stride(0), source.stride(0), first.stride(0), second.stride(0)),
        (columns, both, width, TILE, message is not None, split),
    )


@triton.jit(do_not_specialize=["rows", "arrived"])
def _take(
    index, target, message, first, second,
    rows, arrived,
    target_row, message_row, first_row, second_row,
    FIRST: tl.constexpr, BOTH: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, REMOTE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(1) * WIDTH
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = (begin + tl.arange(0, WIDTH))[None, :]
    inside = (row < rows)[:, None] & (col < BOTH)
    source = tl.load(index + row, mask=row < rows, other=0)
    remote = (source < arrived)[:, None]
    own = (source - arrived).to(tl.int64)[:, None]
    there = message + source.to(tl.int64)[:, None] * message_row + col
    if SPLIT:
        base = tl.where(begin < FIRST, first, second)
        stride = tl.where(begin < FIRST, first_row, second_row)
        here = base + own * stride + (col - tl.where(begin < FIRST, 0, FIRST))
        value = tl.load(tl.where(remote, there, here) if REMOTE else here, mask=inside, other=0.0)
    else:
        local = inside & ~remote if REMOTE else inside
        left = tl.load(first + own * first_row + col, mask=local & (col < FIRST), other=0.0)
        right = tl.load(second + own * second_row + (col - FIRST), mask=local & (col >= FIRST), other=0.0)
        value = tl.where(col < FIRST, left, right)
        if REMOTE:
            value = tl.where(remote, tl.load(there, mask=inside & remote, other=0.0), value)
    place = target + row.to(tl.int64)[:, None] * target_row + col
    tl.store(place, value.to(target.dtype.element_ty), mask=inside)


def add_rows(tiles: Tensor, sources: Tensor, message: Tensor, pair: Pair, sums: Pair, fresh: bool) -> None:
    """See `rows.add_rows`; the tables are those of `Additions.tables`."""
    columns, both = sums[0].shape[1], sums[0].shape[1] + sums[1].shape[1]
    width, split = _width(columns, both)
    launch(
        _add,
        (tiles.shape[0], -(-both // width)),
        (tiles, sources, message, *pair, *sums),
        (),
        (message.stride(0), pair[0].stride(0), pair[1].stride(0), sums[0].stride(0), sums[1].stride(0)),
        (columns, both, width, TILE, split, fresh),
    )


@triton.jit
def _add(
    tiles, sources, message, first, second, first_sum, second_sum,
    message_row, first_row, second_row, first_sum_row, second_sum_row,
    FIRST: tl.constexpr, BOTH: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
    FRESH: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 5
    offset = tl.load(tile + 2)
    step = tl.arange(0, ROWS)
    rows = (step < tl.load(tile + 1))[:, None]
    begin = tl.program_id(1) * WIDTH
    col = (begin + tl.arange(0, WIDTH))[None, :]
    row = (tl.load(tile) + step).to(tl.int64)[:, None]
    last = tl.load(tile + 4)
    if SPLIT:
        shift = tl.where(begin < FIRST, 0, FIRST)
        base = tl.where(begin < FIRST, first, second)
        stride = tl.where(begin < FIRST, first_row, second_row)
        stride_of_sum = tl.where(begin < FIRST, first_sum_row, second_sum_row)
        place = tl.where(begin < FIRST, first_sum, second_sum) + row * stride_of_sum + (col - shift)
        inside = rows & (col < BOTH)
        total = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
        if not FRESH:
            total += tl.load(place, mask=inside, other=0.0)
        for number in range(tl.load(tile + 3), last):
            source = (tl.load(sources + number * 2) + offset + step).to(tl.int64)[:, None]
            if tl.load(sources + number * 2 + 1) != 0:
                total += tl.load(message + source * message_row + col, mask=inside, other=0.0).to(tl.float32)
            else:
                total += tl.load(base + source * stride + (col - shift), mask=inside, other=0.0).to(tl.float32)
        tl.store(place, total.to(first_sum.dtype.element_ty), mask=inside)
    else:
        left, right = rows & (col < FIRST), rows & (col >= FIRST) & (col < BOTH)
        first_at = first_sum + row * first_sum_row + col
        second_at = second_sum + row * second_sum_row + (col - FIRST)
        total = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
        if not FRESH:
            total += tl.load(first_at, mask=left, other=0.0) + tl.load(second_at, mask=right, other=0.0)
        for number in range(tl.load(tile + 3), last):
            source = (tl.load(sources + number * 2) + offset + step).to(tl.int64)[:, None]
            if tl.load(sources + number * 2 + 1) != 0:
                total += tl.load(message + source * message_row + col, mask=left | right, other=0.0).to(tl.float32)
            else:
                total += tl.load(first + source * first_row + col, mask=left, other=0.0).to(tl.float32)
                total += tl.load(second + source * second_row + (col - FIRST), mask=right, other=0.0).to(tl.float32)
        tl.store(first_at, total.to(first_sum.dtype.element_ty), mask=left)
        tl.store(second_at, total.to(first_sum.dtype.element_ty), mask=right)
