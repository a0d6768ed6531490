"""Host objects by number, for operators that take only tensors and numbers.

A compiled graph cannot hold a Layout: it would be compiled anew for every batch. It holds a tensor with the layout's
number instead, and saves it for the backward pass like any other, so that the tensor's memory is what must keep the
object alive: until the last graph that may still run backward is gone, and no longer. Views, detached tensors and
whatever else shares the memory do as well. The table itself keeps nothing alive.
"""

import sys
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class _Memory(bytearray):
    """The memory of a number's tensor. torch holds it for as long as any tensor's storage uses it."""

    value: Any


_memories: WeakValueDictionary[int, _Memory] = WeakValueDictionary()
_numbers = count()


def number_of(value: Any) -> Tensor:
    """A new number for `value`, never given again in this process: (1,) int64 on the host. It keeps `value` alive."""
    number = next(_numbers)
    memory = _Memory(number.to_bytes(8, sys.byteorder))
    memory.value = value
    _memories[number] = memory
    # A tensor of inference mode could not be saved for a backward pass.
    with torch.inference_mode(False):
        return torch.frombuffer(memory, dtype=torch.int64)


def by_number(number: Tensor) -> Any:
    """The object of a number. Raises RuntimeError if nothing shares memory with the number's own tensor any more."""
    memory = _memories.get(int(number))
    if memory is None:
        raise RuntimeError(
            f"the object of number {int(number)} is gone: its tensor was copied, and neither the object nor the tensor "
            "was kept. Saved-tensor hooks that copy (save_on_cpu with pinned memory) must leave host tensors as they "
            "are, or the caller keeps the batch until after backward"
        )
    return memory.value
