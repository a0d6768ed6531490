"""Memory of every rank of one NVLink domain that all of them read: `torch.distributed._symmetric_memory`."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class PeerMemory:
    """Two message buffers, of `half` bytes each, on every rank, and those of all ranks mapped into this process.

    Arguments:
        addresses, table: where each rank's begin, on the host and on the device.
    """

    def __init__(self, half: int) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self.half = half
        device = torch.device("cuda", torch.cuda.current_device())
        self.own: Tensor = symmetric.empty(2 * half, dtype=torch.uint8, device=device)

    def open(self, group: dist.ProcessGroup) -> None:
        """Map the memory of all ranks, each of which has made its own. Collective."""
        import torch.distributed._symmetric_memory as symmetric

        self._handle: Any = symmetric.rendezvous(self.own, group)
        pointers = self._handle.buffer_ptrs
        inside = self.own.data_ptr() - pointers[dist.get_rank(group)]  # of an allocation, the same on all ranks
        self.addresses = [pointer + inside for pointer in pointers]
        self.table = torch.tensor(self.addresses, device=self.own.device)

    def barrier(self) -> None:
        """All ranks have come to this point of the current stream."""
        self._handle.barrier(channel=0)
