"""Numbers of an engine that are the same on every rank: checksums of what all hold, and the optimizer's own."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(tensors: Iterable[Tensor]) -> Tensor | int:
    """A checksum of the bits of all tensors, an int64 scalar where they are: any one flipped bit changes it.

    Nothing waits for the device. 0 where there are no tensors.
    """
    sums = [_bits(tensor.detach()) for tensor in tensors]
    if not sums:
        return 0
    place = torch.arange(1, 2 * len(sums), 2, device=sums[0].device)  # odd, so that no bit of a sum is lost
    return (torch.stack([one.to(sums[0].device) for one in sums]) * place).sum()


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.contiguous().view(-1)
    return flat.view(_INTEGERS.get(flat.element_size(), torch.uint8)).sum(dtype=torch.int64)


def numbers_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Learning rate and count of steps, of the first parameter that has them."""
    rate = optimizer.param_groups[0]["lr"]
    counts = (state["step"] for state in optimizer.state.values() if "step" in state)
    return {"the optimizer's learning rate": rate, "the optimizer's count of steps": next(counts, 0)}
