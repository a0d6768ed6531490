"""The merge of `merge.py` as one Triton kernel: one pass over memory. Imported only where triton is.

Legend: n rows, H heads, V value head dim. A program takes a run of rows of one head, so that each row is one contiguous
read of V elements and the log-sum-exps of its rows lie side by side.
"""

import triton
import triton.language as tl
from torch import Tensor

from ringattn.kernels.movement.launch import launch, power_of_two

TILE = 2048  # elements of one program: with 4 warps every thread moves 16, as whole vectors


def merge_into(acc: Tensor, acc_lse: Tensor, out: Tensor, lse: Tensor, target: Tensor, tile: int = TILE) -> None:
    """Merge `out` into `acc` and write the result to `target`, which may be `acc` or `out` itself.

    Arguments:
        acc: (n, H, V) float32, and acc_lse: (H, n) float32, which is updated in place.
        out: (n, H, V) float32, bfloat16 or float16, and lse: (H, n).
        target: (n, H, V), rounded to its dtype.
    Any strides, but the elements of a head side by side.
    """
    n, heads, dim = acc.shape
    if not acc.numel():
        return
    width = power_of_two(dim)
    rows = max(1, tile // width)
    strides = (*acc.stride()[:2], *out.stride()[:2], *target.stride()[:2])
    launch(
        _merge,
        (-(-n // rows) * heads, 1),
        (acc, out, target, acc_lse, lse),
        (n, *acc_lse.stride(), *lse.stride()),
        (),
        (heads, *strides, dim, width, rows),
    )


# Lengths and log-sum-exp views differ from call to call: they must not choose between compiled variants. The strides
# of the large tensors belong to a model, and as constants they let the compiler prove that rows are aligned.
@triton.jit(
    do_not_specialize=["n", "acc_lse_head", "acc_lse_row", "lse_head", "lse_row"],
    do_not_specialize_on_alignment=["acc_lse", "lse"],
)
def _merge(
    acc, out, target, acc_lse, lse,
    n, acc_lse_head, acc_lse_row, lse_head, lse_row,
    HEADS: tl.constexpr,
    ACC_ROW: tl.constexpr, ACC_HEAD: tl.constexpr, OUT_ROW: tl.constexpr, OUT_HEAD: tl.constexpr,
    TARGET_ROW: tl.constexpr, TARGET_HEAD: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % HEADS
    rows = (tl.program_id(0) // HEADS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, WIDTH)
    inside = rows < n
    old_at = acc_lse + head * acc_lse_head.to(tl.int64) + rows * acc_lse_row
    old = tl.load(old_at, mask=inside, other=float("-inf")).to(tl.float32)
    new_at = lse + head * lse_head.to(tl.int64) + rows * lse_row
    new = tl.load(new_at, mask=inside, other=float("-inf")).to(tl.float32)
    elements = inside[:, None]
    if WIDTH != DIM:
        elements = elements & (cols < DIM)[None, :]
    acc_at = acc + (rows * ACC_ROW + head * ACC_HEAD)[:, None] + cols[None, :]
    out_at = out + (rows * OUT_ROW + head * OUT_HEAD)[:, None] + cols[None, :]
    merged = tl.load(acc_at, mask=elements, other=0.0)
    part = tl.load(out_at, mask=elements, other=0.0).to(tl.float32)

    top = tl.maximum(old, new)
    top = tl.where(top == float("-inf"), 0.0, top)  # no keys on either side: both weights are 0 and not NaN
    old_weight = tl.exp(old - top)
    new_weight = tl.exp(new - top)
    total = old_weight + new_weight
    scale = 1.0 / tl.where(total == 0.0, 1.0, total)
    merged = merged * (old_weight * scale)[:, None] + part * (new_weight * scale)[:, None]

    tl.debug_barrier()  # `target` may be `out`, and threads share log-sum-exps: nobody writes before all have read
    target_at = target + (rows * TARGET_ROW + head * TARGET_HEAD)[:, None] + cols[None, :]
    tl.store(target_at, merged, mask=elements)
    tl.store(old_at, top + tl.log(total), mask=inside)
