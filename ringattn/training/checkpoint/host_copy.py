"""A copy of what is saved in host memory, so that the training can go on while it is made and written."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ringattn.memory.host import host_memory
from ringattn.training.checkpoint.snapshot import Snapshot

_ALIGNMENT = 64  # bytes
# Bytes that are copied at a time. A copy engine has work of other streams as well, attention's transfers between GPUs
# among it, and takes it between copies: a weight of 500 MB would let that wait for 10 ms.
_PIECE = 32 << 20
# Copies that are asked for at a time: CUDA lets the host wait where about a thousand are not made yet.
_MOST = 512


class CopyStream:
    """A stream of a GPU for copies alone, beside its kernels. One round of copies is under way at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._over: Any = None  # the event after the last round

    def begin(self, copies: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copies sources to targets (pairs of target and source), after what the device was asked for so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for target, source in pieces(list(copies)):
                target.copy_(source, non_blocking=True)
            self._over = torch.cuda.Event(blocking=True)  # whoever waits sleeps: a thread that spun would take a core
            self._over.record()

    def hold(self) -> None:
        """Kernels that come wait for the copies; the host does not."""
        if self._over is not None:
            torch.cuda.current_stream(self._device).wait_event(self._over)

    def wait(self) -> None:
        """The host waits for the copies. Raises RuntimeError for a device that has failed."""
        if self._over is not None:
            with torch.cuda.device(self._device):  # a thread is on the first device, and would wake it
                self._over.synchronize()


def pieces(copies: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of target and source in parts of `_PIECE`, or of more where that would be too many parts, as views; a
    tensor whose numbers do not follow one another is one part."""
    piece = max(_PIECE, sum(source.nbytes for _, source in copies) // _MOST)
    for target, source in copies:
        if source.nbytes <= piece or not (source.is_contiguous() and target.is_contiguous()):
            yield target, source
        else:
            size = piece // source.element_size()
            yield from zip(target.view(-1).split(size), source.view(-1).split(size), strict=True)


class HostCopy:
    """Host memory for one copy, taken at the first one and used again; page-locked where a GPU copies into it.

    It is one piece, locked by `cudaHostRegister`: torch's own pinned memory is rounded up to powers of two. One copy at
    a time: `wait` comes before the next.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._locked = False
        self._stream = CopyStream(device) if device.type == "cuda" else None
        self._sources: Snapshot | None = None

    def of(self, snapshot: Snapshot) -> Snapshot:
        """The same with its tensors copied, which the next call overwrites.

        What is on the host is copied when this returns. What is on a GPU arrives later, which `wait` waits for; `hold`
        comes before anything that changes it. Until then this holds it, so that nobody else gets its memory.

        Raises MemoryError with the numbers if there is not enough host memory.
        """
        places = self._places(snapshot)
        copies = {name: self._view(places[name], tensor) for name, tensor in snapshot.tensors.items()}
        pairs = [(copies[name], tensor) for name, tensor in snapshot.tensors.items()]
        if self._stream is not None:
            self._sources = snapshot
            self._stream.begin(pair for pair in pairs if pair[1].device.type == self._device.type)
            pairs = [pair for pair in pairs if pair[1].device.type != self._device.type]
        for target, source in pairs:
            target.copy_(source)
        return Snapshot(copies, snapshot.index)

    def hold(self) -> None:
        """Before what was copied changes: the device, not the host, waits until it is copied."""
        if self._stream is not None:
            self._stream.hold()

    def wait(self) -> None:
        """Until the copy is made. Any thread may. Raises OSError if the device has failed."""
        if self._stream is None:
            return
        try:
            self._stream.wait()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]  # CUDA goes on with advice
            raise OSError(None, f"the copy to host memory failed: {reason}", None) from error
        self._sources = None

    def take_memory(self, snapshot: Snapshot) -> None:
        """Takes the memory for a copy ahead, where a GPU would wait for it to be locked: about a second for each GiB.

        Raises MemoryError as `of` does.
        """
        if self._device.type == "cuda":
            self._places(snapshot)

    def close(self) -> None:
        """Gives the memory back."""
        with suppress(OSError):  # a device that has failed copies nothing any more
            self.wait()
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
            # Memory that cannot be locked is copied into all the same, at less speed, and the host waits for it.
            self._locked = int(torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), size, 0)) == 0
