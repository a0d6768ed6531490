"""The packing of `pack.py` as one Triton kernel. Imported only where triton is."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements of one program


def pack_heads(x: Tensor, target: Tensor, slots: Tensor, aligned: bool) -> None:
    """Heads of x (t, H, D), the elements of a head side by side, to the flat `target`.

    Arguments:
        slots: (n, 3) int64: head, start and stride of each.
        aligned: starts and strides are multiples of 8.
    """
    rows, _, dim = x.shape
    width = triton.next_power_of_2(dim)
    step = max(1, TILE // width)
    with torch.cuda.device_of(x):
        _pack[(triton.cdiv(rows, step), len(slots))](
            x,
            target,
            slots,
            rows,
            x.stride(0),
            x.stride(1),
            DIM=dim,
            WIDTH=width,
            ROWS=step,
            ALIGN=8 if aligned else 1,
        )


@triton.jit(do_not_specialize=["rows"])
def _pack(
    x, target, slots, rows, x_row, x_head,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    slot = slots + tl.program_id(1) * 3
    head = tl.load(slot)
    start = tl.multiple_of(tl.load(slot + 1), ALIGN)
    stride = tl.multiple_of(tl.load(slot + 2), ALIGN)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (col < DIM)[None, :]
    part = tl.load(x + (row * x_row + head * x_head)[:, None] + col[None, :], mask=inside)
    tl.store(target + (start + row * stride)[:, None] + col[None, :], part, mask=inside)
