"""Where the heads of messages stand in a packed buffer: slots, as integers that kernels read."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.kept import kept, kept_already
from ringattn.kernels.spec import to_device

MOST = 3  # tensors that a fused kernel takes


class Slot(NamedTuple):
    """Where one head is in a message: its row i are the elements `start + i * stride` and on."""

    tensor: int
    head: int
    start: int
    stride: int


@dataclass(frozen=True)
class Slots:
    """The slots of the tensors of a message. They differ from batch to batch: who plans an exchange keeps them with it.

    A head that has several slots is sent to each, and is the sum of what comes back in them, in their order.
    """

    slots: tuple[Slot, ...]

    @cached_property
    def aligned(self) -> bool:
        """Whether every row of every slot starts at a multiple of 8 elements, so that it moves in vectors."""
        return all(slot.start % 8 == 0 and slot.stride % 8 == 0 for slot in self.slots)

    @cached_property
    def by_head(self) -> dict[tuple[int, int], list[Slot]]:
        """The slots of each head of each tensor."""
        found: dict[tuple[int, int], list[Slot]] = {}
        for slot in self.slots:
            found.setdefault((slot.tensor, slot.head), []).append(slot)
        return found

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """For the fused kernels, int64, made once: slots (n, 4) ordered by head, and heads (m, 4): tensor, head, first
        and last slot."""
        found: tuple[Tensor, Tensor] | None = kept_already(self, device)  # nothing else is kept here
        return kept(self, device, lambda: self._made_tables(device)) if found is None else found

    def _made_tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        slots: list[Slot] = []
        heads: list[tuple[int, int, int, int]] = []
        for (tensor, head), some in self.by_head.items():
            heads.append((tensor, head, len(slots), len(slots) + len(some)))
            slots += some
        rows, groups = (torch.tensor(table, dtype=torch.int64, device="cpu").view(-1, 4) for table in (slots, heads))
        return to_device(rows, device), to_device(groups, device)
