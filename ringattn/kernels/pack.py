"""Heads of a tensor laid out for an exchange: one fused kernel on GPUs with Triton, else a copy per head."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.kernels.spec import to_device


class Slot(NamedTuple):
    """Where one head goes: row i of head `head` to the elements `start + i * stride` and on of a flat buffer."""

    head: int
    start: int
    stride: int


def pack_heads(x: Tensor, target: Tensor, slots: tuple[Slot, ...]) -> None:
    """Copy heads of x (t, H, D) into the flat `target`; a head may go to several slots."""
    if not x.numel() or not slots:
        return
    fused = _fused() if x.is_cuda and x.stride(2) == 1 else None
    if fused is not None:
        fused(x, target, _on_device(slots, x.device), _aligned(slots))
        return
    for slot in slots:
        target.as_strided((x.shape[0], x.shape[2]), (slot.stride, 1), target.storage_offset() + slot.start).copy_(
            x[:, slot.head]
        )


@cache
def _fused() -> Callable[[Tensor, Tensor, Tensor, bool], None] | None:
    try:
        from ringattn.kernels import pack_triton
    except ImportError:
        return None
    return pack_triton.pack_heads


@cache  # the layers of a model ask for the same
def _on_device(slots: tuple[Slot, ...], device: torch.device) -> Tensor:
    return to_device(torch.tensor(slots, dtype=torch.int64), device)


@cache
def _aligned(slots: tuple[Slot, ...]) -> bool:
    """Whether every row of every slot starts at a multiple of 8 elements, so that it can be stored in vectors."""
    return all(slot.start % 8 == 0 and slot.stride % 8 == 0 for slot in slots)
