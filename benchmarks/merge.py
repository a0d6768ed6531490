"""Bandwidth of the merge of partial results on one GPU, beside that of `torch.Tensor.copy_`.

    python benchmarks/merge.py --rows 8192 16384 32768 65536

One table row per size. Bytes per element of the merge: 4 read and 4 written of the float32 accumulator, 2 read of the
bfloat16 part; per row and head 12 more for the log-sum-exps. The copy is of a tensor as large as the accumulator.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch

from ringattn.kernels.merge import plain_merge_
from ringattn.kernels.merge_triton import TILE, merge_into

REPEATS = 50


def median_ms(step: Callable[[], object]) -> float:
    """Median time of one step, after warming up, with a cold L2 cache between steps."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    for _ in range(5):
        step()
    times = []
    for _ in range(REPEATS):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        stop.record()
        times.append((start, stop))
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(stop) for start, stop in times)[REPEATS // 2]


def measure(rows: int, heads: int, dim: int, tile: int) -> tuple[float, float, float]:
    """GB/s of the copy, of the fused merge and of the merge in plain torch."""
    acc, source = (torch.randn(rows, heads, dim, device="cuda") for _ in range(2))
    part = source.bfloat16()
    acc_lse, lse = (torch.randn(heads, rows, device="cuda") for _ in range(2))
    merged = acc.numel() * 10 + lse.numel() * 12
    steps = (
        (acc.numel() * 8, partial(acc.copy_, source)),
        (merged, partial(merge_into, acc, acc_lse, part, lse, acc, tile)),
        (merged, partial(plain_merge_, acc, acc_lse, part, lse)),
    )
    copied, fused, plain = (size / median_ms(step) / 1e6 for size, step in steps)
    return copied, fused, plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, 16384, 32768, 65536])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--tile", type=int, nargs="+", default=[TILE], help="elements of one program")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| rows × heads × dim | tile | copy_ GB/s | fused merge GB/s | of copy | plain torch GB/s |")
    print("|---|---|---|---|---|---|")
    for rows in args.rows:
        for tile in args.tile:
            copied, fused, plain = measure(rows, args.heads, args.dim, tile)
            size = f"{rows} × {args.heads} × {args.dim}"
            print(f"| {size} | {tile} | {copied:.0f} | {fused:.0f} | {fused / copied:.0%} | {plain:.0f} |", flush=True)


if __name__ == "__main__":
    main()
