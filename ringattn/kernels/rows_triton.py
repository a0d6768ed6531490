"""The kernels of `rows.py` in Triton. Imported only where triton is."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringattn.kernels.rows import TILE, Pair

WIDTH = 512  # most columns of a program


def take_rows(index: Tensor, target: Tensor, message: Tensor | None, pair: Pair) -> None:
    """See `rows.take_rows`."""
    first, second = pair
    source = target if message is None else message
    columns = first.shape[1], target.shape[1]
    width = min(WIDTH, triton.next_power_of_2(columns[1]))
    with torch.cuda.device_of(target):
        _take[(triton.cdiv(len(index), TILE), triton.cdiv(columns[1], width))](
            index, target, source, first, second, len(index), 0 if message is None else len(message),
            target.stride(0), source.stride(0), first.stride(0), second.stride(0),
            FIRST=columns[0], BOTH=columns[1], WIDTH=width, ROWS=TILE, REMOTE=message is not None,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "arrived"])
def _take(
    index, target, message, first, second, rows, arrived, target_row, message_row, first_row, second_row,
    FIRST: tl.constexpr, BOTH: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, REMOTE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH))[None, :]
    inside = (row < rows)[:, None] & (col < BOTH)
    source = tl.load(index + row, mask=row < rows, other=0)
    local = inside
    if REMOTE:
        local = inside & (source >= arrived)[:, None]
        there = message + source.to(tl.int64)[:, None] * message_row + col
        value = tl.load(there, mask=inside & (source < arrived)[:, None], other=0.0).to(target.dtype.element_ty)
    own = (source - arrived).to(tl.int64)[:, None]
    left = tl.load(first + own * first_row + col, mask=local & (col < FIRST), other=0.0)
    right = tl.load(second + own * second_row + (col - FIRST), mask=local & (col >= FIRST), other=0.0)
    mine = tl.where(col < FIRST, left, right).to(target.dtype.element_ty)
    if REMOTE:
        mine = tl.where(local, mine, value)
    tl.store(target + row.to(tl.int64)[:, None] * target_row + col, mine, mask=inside)


def add_rows(tiles: Tensor, sources: Tensor, message: Tensor, pair: Pair, sums: Pair) -> None:
    """See `rows.add_rows`; the tables are those of `Additions.tables`."""
    columns = sums[0].shape[1], sums[0].shape[1] + sums[1].shape[1]
    width = min(WIDTH, triton.next_power_of_2(columns[1]))
    with torch.cuda.device_of(message):
        _add[(len(tiles), triton.cdiv(columns[1], width))](
            tiles, sources, message, *pair, *sums,
            message.stride(0), pair[0].stride(0), pair[1].stride(0), sums[0].stride(0), sums[1].stride(0),
            FIRST=columns[0], BOTH=columns[1], WIDTH=width, ROWS=TILE,
        )  # fmt: skip


@triton.jit
def _add(
    tiles, sources, message, first, second, first_sum, second_sum,
    message_row, first_row, second_row, first_sum_row, second_sum_row,
    FIRST: tl.constexpr, BOTH: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 5
    offset = tl.load(tile + 2)
    step = tl.arange(0, ROWS)
    rows = (step < tl.load(tile + 1))[:, None]
    col = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH))[None, :]
    left, right = rows & (col < FIRST), rows & (col >= FIRST) & (col < BOTH)
    row = (tl.load(tile) + step).to(tl.int64)[:, None]
    first_at = first_sum + row * first_sum_row + col
    second_at = second_sum + row * second_sum_row + (col - FIRST)
    total = tl.load(first_at, mask=left, other=0.0) + tl.load(second_at, mask=right, other=0.0)
    for number in range(tl.load(tile + 3), tl.load(tile + 4)):
        source = (tl.load(sources + number * 2) + offset + step).to(tl.int64)[:, None]
        if tl.load(sources + number * 2 + 1) != 0:
            total += tl.load(message + source * message_row + col, mask=left | right, other=0.0).to(tl.float32)
        else:
            total += tl.load(first + source * first_row + col, mask=left, other=0.0).to(tl.float32)
            total += tl.load(second + source * second_row + (col - FIRST), mask=right, other=0.0).to(tl.float32)
    tl.store(first_at, total, mask=left)
    tl.store(second_at, total, mask=right)
