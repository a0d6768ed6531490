"""A copy of what is saved in host memory, so that the training can go on while it is written."""

import torch
from torch import Tensor

from ringattn.memory.host import host_memory
from ringattn.training.checkpoint.snapshot import Snapshot

_ALIGNMENT = 64  # bytes


class HostCopy:
    """Host memory for one copy, taken at the first one and used again; page-locked where a GPU copies into it.

    It is one piece, locked by `cudaHostRegister`: torch's own pinned memory is rounded up to powers of two.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._locked = False

    def of(self, snapshot: Snapshot) -> Snapshot:
        """The same with its tensors copied, which the next call overwrites. Waits for the device.

        Raises MemoryError with the numbers if there is not enough host memory.
        """
        places = self._places(snapshot)
        copies = {name: self._view(places[name], tensor) for name, tensor in snapshot.tensors.items()}
        for name, tensor in snapshot.tensors.items():
            copies[name].copy_(tensor, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return Snapshot(copies, snapshot.index)

    def take_memory(self, snapshot: Snapshot) -> None:
        """Takes the memory for a copy ahead, where a GPU would wait for it to be locked: about a second for each GiB.

        Raises MemoryError as `of` does.
        """
        if self._device.type == "cuda":
            self._places(snapshot)

    def close(self) -> None:
        """Gives the memory back."""
        if self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
        self._memory, self._locked = torch.empty(0, dtype=torch.uint8), False

    def _places(self, snapshot: Snapshot) -> dict[str, int]:
        """Where each tensor's copy begins, in memory that is there then."""
        places, size = {}, 0
        for name, tensor in snapshot.tensors.items():
            places[name] = size
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._take(size)
        return places

    def _view(self, start: int, like: Tensor) -> Tensor:
        return self._memory[start : start + like.nbytes].view(like.dtype).view(like.shape)

    def _take(self, size: int) -> None:
        if len(self._memory) >= size:
            return
        self.close()
        host = host_memory()
        if host.available is not None and size > host.available:
            # Linux would hand it out, and kill whoever uses what there is not.
            raise MemoryError(f"{size / 2**30:.2f} GiB of host memory are needed for a copy: {host}")
        self._memory = torch.empty(size, dtype=torch.uint8)
        if self._device.type == "cuda" and size:
            # Memory that cannot be locked is copied into all the same, at less speed.
            self._locked = int(torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), size, 0)) == 0
