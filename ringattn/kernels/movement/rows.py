"""Rows of two tensors, say keys and values, on their way in and out of messages: one fused kernel each on GPUs with
Triton, else plain torch.

A message row holds a row of the first tensor and one of the second, side by side. All tensors here have two dimensions
and the elements of a row side by side: (rows, A) and (rows, B) of a pair, (rows, A + B) of a message.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringattn.kernels.movement.additions import Additions, Pair
from ringattn.kernels.spec import Range, accumulation_dtype


def flat_pair(first: Tensor, second: Tensor) -> Pair:
    """(n, K, D) and (n, K, V) as (n, K * D) and (n, K * V): views."""
    return first.flatten(1), second.flatten(1)


def row_index(ranges: Sequence[Range]) -> "np.ndarray[Any, np.dtype[np.int32]]":
    """The numbers of the ranges, one after another."""
    starts = np.array([start for start, _ in ranges], dtype=np.int64)
    sizes = np.array([stop - start for start, stop in ranges], dtype=np.int64)
    before = np.cumsum(sizes) - sizes
    return (np.repeat(starts - before, sizes) + np.arange(sizes.sum())).astype(np.int32)


def take_rows(index: Tensor, target: Tensor, message: Tensor | None, pair: Pair) -> None:
    """Fill `target` (n, A + B), in its dtype, with rows of a message (m, A + B) and of a pair.

    Arguments:
        index: (n,) int32: j < m is row j of the message, m + i row i of the pair. m is 0 without a message.
    """
    if not target.numel():
        return
    fused = _fused()
    if fused is not None and target.is_cuda:
        fused.take_rows(index, target, message, pair)
        return
    arrived = 0 if message is None else len(message)
    remote = index < arrived
    if message is not None:
        target[remote] = message[index[remote].long()].to(target.dtype)
    local, width = index[~remote].long() - arrived, pair[0].shape[1]
    target[~remote] = torch.cat([x[local].to(target.dtype) for x in pair], 1)
    assert target.shape[1] == width + pair[1].shape[1]


def add_rows(additions: Additions, message: Tensor | None, pair: Pair, sums: Pair, fresh: bool = False) -> None:
    """Add rows of a message and of a pair to `sums`, a pair of as many columns in the precision for that.

    Each row is added up in the order of `additions`.

    Arguments:
        message: may be None where all additions are of the pair.
        fresh: the rows that additions name hold nothing yet and get what is added, rounded once to the dtype of `sums`,
            which may then be any. Others are left alone.
    """
    if not additions.parts:
        return
    fused = _fused()
    like = pair[0] if message is None else message
    if fused is not None and like.is_cuda and accumulation_dtype(like.dtype) == torch.float32:
        fused.add_rows(*additions.tables(like.device), like, pair, sums, fresh)
        return
    width = sums[0].shape[1]
    for (start, stop), parts in additions.segments:
        for number, total in enumerate(sums):
            columns = slice(0, width) if number == 0 else slice(width, None)
            terms = [
                (like[rows, columns] if part.remote else pair[number][rows]).to(accumulation_dtype(like.dtype))
                for part in parts
                for rows in [slice(part.source + start - part.target[0], part.source + stop - part.target[0])]
            ]
            total[start:stop] = sum(terms[1:], terms[0]) if fresh else sum(terms, total[start:stop])


@cache
def _fused() -> Any:
    """The Triton kernels, or None without Triton, which is imported only when it is needed."""
    if not torch.cuda.is_available():
        return None
    try:
        from ringattn.kernels.movement import rows_triton
    except ImportError:
        return None
    return rows_triton
