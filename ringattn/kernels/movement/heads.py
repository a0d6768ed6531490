"""Heads of several tensors in and out of the messages of an exchange: one fused kernel each on GPUs with Triton, else a
copy per head."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ringattn.kernels.movement.slots import MOST, Slot, Slots
from ringattn.kernels.spec import accumulation_dtype


def pack_heads(tensors: Sequence[Tensor], message: Tensor, slots: Slots) -> None:
    """Copy heads of tensors (t, H, D) into the flat `message`."""
    if not len(tensors[0]) or not slots.slots:
        return
    if (fused := _fused(tensors)) is not None:
        fused.pack_heads(tensors, message, slots.tables(message.device)[0], slots.aligned)
        return
    for slot in slots.slots:
        x = tensors[slot.tensor]
        _rows(message, slot, x).copy_(x[:, slot.head])


def unpack_heads(message: Tensor, tensors: Sequence[Tensor], slots: Slots) -> None:
    """Fill heads of tensors (t, H, D) that have slots from the flat `message`; sums are rounded once."""
    if not len(tensors[0]) or not slots.slots:
        return
    if (fused := _fused(tensors)) is not None:
        fused.unpack_heads(message, tensors, *slots.tables(message.device), slots.aligned)
        return
    for (number, head), some in slots.by_head.items():
        x = tensors[number]
        if len(some) == 1:
            x[:, head] = _rows(message, some[0], x)
            continue
        total = _rows(message, some[0], x).to(accumulation_dtype(x.dtype))
        for slot in some[1:]:
            total = total + _rows(message, slot, x)
        x[:, head] = total


def head_columns(rows: Tensor, counts: Sequence[int], dims: Sequence[int]) -> list[Tensor]:
    """The columns of rows (n, sum of count * dim) as heads of several tensors: views (n, count, dim), one call each."""
    views, start = [], rows.storage_offset()
    for count, dim in zip(counts, dims, strict=True):
        views.append(rows.as_strided((rows.shape[0], count, dim), (rows.stride(0), dim, 1), start))
        start += count * dim
    return views


def _rows(message: Tensor, slot: Slot, x: Tensor) -> Tensor:
    """(t, D) of the message."""
    return message.as_strided((x.shape[0], x.shape[2]), (slot.stride, 1), message.storage_offset() + slot.start)


def _fused(tensors: Sequence[Tensor]) -> Any:
    """The Triton kernels if they fit, else None."""
    x = tensors[0]
    fits = x.is_cuda and x.dtype != torch.float64 and len(tensors) <= MOST  # they add in float32
    fits = fits and all(x.stride(2) == 1 for x in tensors)
    return _kernels() if fits else None


@cache
def _kernels() -> Any:
    """The Triton kernels, or None without Triton, which is imported only when GPU tensors are packed."""
    try:
        from ringattn.kernels.movement import heads_triton
    except ImportError:
        return None
    return heads_triton
