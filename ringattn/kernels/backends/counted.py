"""The backward pass of FlashAttention 2, for as many heads at a time as its kernel can count.

The kernel adds up query gradients in float32 rows of all heads, 128 rows more for every block, and finds the first row
of a block by a product of ints (flash-attn 2 and torch's copy of it: `q_offset(..., params.h * params.d_rounded, bidb)`
in flash_bwd_preprocess_kernel.h and flash_bwd_kernel.h). From 2^31 numbers on, which are 524,288 tokens of 32 heads of
128, it reads and writes elsewhere and says nothing: on an H200 with torch 2.11 dq was 0.7 of its norm from right, or
the process ended with an illegal access. Heads know nothing of each other, so some of them are a call of their own.
"""

from collections.abc import Callable
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from ringattn.kernels.spec import Grads, SavedCall

COUNTED = 2**31
ROUNDED = 64  # a multiple of what the kernel rounds head dims to
PADDING = 128  # rows that it adds to each block

Backward = Callable[[Tensor, SavedCall, Grads], None]


def backward_within_count(backward: Backward, dout: Tensor, saved: SavedCall, grads: Grads) -> None:
    """`backward` of a call, once for all heads or for some at a time.

    Raises NotImplementedError if the rows of one head are too many.
    """
    q, k, v, out, lse, call, _ = saved
    parts = head_parts(q.shape[0] + PADDING * len(call.blocks), q.shape[1], k.shape[1], q.shape[2])
    if len(parts) == 1:
        backward(dout, saved, grads)
        return
    for keys, group in groupby(parts, itemgetter(1)):
        queries = [one for one, _ in group]
        saves = [
            saved._replace(q=q[:, own], k=k[:, keys], v=v[:, keys], out=out[:, own], lse=lse[own]) for own in queries
        ]
        dk, dv = grads.dk[:, keys], grads.dv[:, keys]
        if len(queries) == 1:
            backward(dout[:, queries[0]], saves[0], Grads(grads.dq[:, queries[0]], dk, dv))
            continue
        # Parts of one key head: their gradients are added in float32, and rounded once.
        sums = torch.zeros_like(dk, dtype=torch.float32), torch.zeros_like(dv, dtype=torch.float32)
        for own, save in zip(queries, saves, strict=True):
            part = Grads(grads.dq[:, own], torch.empty_like(dk), torch.empty_like(dv))
            backward(dout[:, own], save, part)
            for total, one in zip(sums, part.tensors[1:], strict=True):
                total += one
        dk.copy_(sums[0])
        dv.copy_(sums[1])


def head_parts(rows: int, heads: int, key_heads: int, head_dim: int) -> list[tuple[slice, slice]]:
    """Query heads and their key heads of each call, in order: all groups that share a key head, or parts of one group.

    Arguments:
        rows: of the sums, the padding of blocks included.
    """
    numbers = max(1, rows * (-(-head_dim // ROUNDED) * ROUNDED))  # of one head
    most, group = (COUNTED - 1) // numbers, heads // key_heads
    if not most:
        raise NotImplementedError(
            f"FlashAttention 2 counts the numbers of a head in int32: {rows:,} rows of {head_dim}, {PADDING} more for "
            "every document included, are too many; put them on more ranks, or use another attention backend"
        )
    if most >= group:
        step = most // group
        keys = [slice(first, min(first + step, key_heads)) for first in range(0, key_heads, step)]
        return [(slice(own.start * group, own.stop * group), own) for own in keys]
    return [
        (slice(first, min(first + most, (key + 1) * group)), slice(key, key + 1))
        for key in range(key_heads)
        for first in range(key * group, (key + 1) * group, most)
    ]
