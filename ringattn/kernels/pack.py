"""Heads of a tensor laid out for an exchange: one fused kernel on GPUs with Triton, else a copy per head."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.kernels.spec import to_device


class Slot(NamedTuple):
    """Where one head goes: row i of head `head` to the elements `start + i * stride` and on of a flat buffer."""

    head: int
    start: int
    stride: int


@dataclass(frozen=True)
class Slots:
    """The slots of one tensor. They differ from batch to batch: whoever plans an exchange keeps them with it."""

    slots: tuple[Slot, ...]

    @cached_property
    def aligned(self) -> bool:
        """Whether every row of every slot starts at a multiple of 8 elements, so that it can be stored in vectors."""
        return all(slot.start % 8 == 0 and slot.stride % 8 == 0 for slot in self.slots)

    def on(self, device: torch.device) -> Tensor:
        """(n, 3) int64: head, start, stride. Made once: the layers of a model ask for the same."""
        kept: dict[torch.device, Tensor] = self.__dict__.setdefault("_kept", {})
        if device not in kept:
            kept[device] = to_device(torch.tensor(self.slots, dtype=torch.int64), device)
        return kept[device]


def pack_heads(x: Tensor, target: Tensor, slots: Slots) -> None:
    """Copy heads of x (t, H, D) into the flat `target`; a head may go to several slots."""
    if not x.numel() or not slots.slots:
        return
    fused = _fused() if x.is_cuda and x.stride(2) == 1 else None
    if fused is not None:
        fused(x, target, slots.on(x.device), slots.aligned)
        return
    for slot in slots.slots:
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
