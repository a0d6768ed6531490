"""What a layer keeps for the backward pass, in host memory until then.

Copies run on a stream of their own, beside the kernels of the next layers: out when a layer is done, and back while
the layer after it goes backward, one ahead. What is kept last is wanted first, so host memory is a stack, and of a
size that is known before the run. (Other implementations copy on the stream of the kernels, which then wait:
transformers' and accelerate's. Hiding both ways is the idea of MEMO, arXiv 2407.12117, and FPDT, arXiv 2408.16978.)

    offload = Offload(device, host_bytes=200 * 2**30)
    with offload.saving():      # every tensor that autograd saves in here goes to the host
        hidden = layer(hidden)
"""

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ringattn.memory.host import host_memory

ALIGNMENT = 512  # bytes
LEAST = 2**20  # bytes: smaller tensors stay where they are
IN_FLIGHT = 2  # tensors that may still be on their way out while later ones are computed


class HostStack:
    """Host memory that is taken and given back in the order of a stack, pinned if a GPU is to copy from it.

    It is one piece of memory, page-locked by `cudaHostRegister`: torch's own pinned allocator rounds each tensor up to
    a power of two, up to twice of what is asked for.
    """

    def __init__(self, size: int, pinned: bool) -> None:
        self.size, self.pinned, self.top, self.most = size, pinned, 0, 0
        self._open: list[_Place] = []
        host = host_memory()
        if host.available is not None and size > host.available:
            # Linux would hand it out, and kill whoever uses what there is not.
            raise MemoryError(
                f"host_bytes={size} ({size / 2**30:.1f} GiB) are more than there is: {host}; offload less"
            )
        try:
            self._memory = torch.empty(size, dtype=torch.uint8, device="cpu")
            if pinned and size:
                result = torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), size, 0)
                torch.cuda.check_error(int(result))
        except RuntimeError as error:
            raise MemoryError(
                f"host_bytes={size} ({size / 2**30:.1f} GiB) cannot be {'pinned' if pinned else 'allocated'} on this "
                f"machine: {error}; {host}; offload less, or raise the limit of locked memory (ulimit -l)"
            ) from error

    def take(self, like: Tensor) -> "_Place":
        """Room for a tensor on top. Raises MemoryError with the numbers if there is none."""
        length = like.numel() * like.element_size()
        first = -(-self.top // ALIGNMENT) * ALIGNMENT
        if first + length > self.size:
            raise MemoryError(
                f"host_bytes={self.size} ({self.size / 2**30:.1f} GiB) are used up: {self.top} bytes are taken and "
                f"{length} more are wanted"
            )
        place = _Place(self.top, self._memory[first : first + length].view(like.dtype).view(like.shape))
        self.top = first + length
        self.most = max(self.most, self.top)
        self._open.append(place)
        return place

    def give_back(self, place: "_Place") -> None:
        """The memory of a place, and of all on top of it that were given back before."""
        place.open = False
        while self._open and not self._open[-1].open:
            self.top = self._open.pop().before

    def close(self) -> None:
        """Unlocks the memory; nothing may be copied from or to it any more."""
        if self.pinned and self.size:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
        self._memory, self.size = torch.empty(0, dtype=torch.uint8), 0


@dataclass(eq=False)
class _Place:
    """Part of the stack, and where its top was before."""

    before: int
    memory: Tensor
    open: bool = True


class _Kept:
    """What stands for a saved tensor in autograd's graph; with the graph it goes, and gives its memory back."""

    def __init__(self, number: int, layer: int, here: Tensor | None, away: _Place | None, stack: HostStack) -> None:
        self.number, self.layer, self.here, self.away, self._stack = number, layer, here, away, stack
        self.arrived: Any = None  # the event after its copy back
        self.asked = False  # whoever needs it has it, or had it

    def __del__(self) -> None:
        if self.away is None:
            return
        # Copies of both ways run on one stream in order, so that a later copy to this place waits for one from it. The
        # device's memory is another matter: kernels get it next, and must wait for a copy that nobody asked for.
        self._stack.give_back(self.away)
        if self.here is not None and self.arrived is not None:
            torch.cuda.current_stream(self.here.device).wait_event(self.arrived)


class Offload:
    """Moves what autograd saves to the host, and back one tensor ahead of its use.

    Arguments:
        device: where the tensors are. On a CPU the same is done with copies, for tests.
        host_bytes: size of the memory that is taken on this rank now, for all layers of a step together.
        least: bytes; smaller tensors stay on the device, and so do parameters.

    Raises MemoryError if the host cannot give so much, or when it is full.
    """

    def __init__(self, device: torch.device, host_bytes: int, least: int = LEAST) -> None:
        if host_bytes < 0:
            raise ValueError(f"host_bytes must be >= 0, got {host_bytes}")
        self.device, self.least = device, least
        self.stack = HostStack(host_bytes, device.type == "cuda")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._leaving: deque[tuple[Tensor, Any]] = deque()
        self._order: list[weakref.ref[_Kept]] = []
        self._layer = 0
        self._shared: dict[int, tuple[StorageWeakRef, tuple[Any, ...], weakref.ref[_Kept]]] = {}

    @contextmanager
    def saving(self, away: bool = True) -> Iterator[None]:
        """What autograd saves inside goes to the host.

        Arguments:
            away: False lets it stay, but when it is used in the backward pass, what lies before it is brought back: for
                the last layers, whose backward pass begins at once.
        """
        self.next_layer()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: self.pack(x, away), self.unpack):
            yield

    def next_layer(self) -> None:
        """What is packed from here on is of another layer, which goes backward before those that were packed."""
        self._layer += 1

    def pack(self, x: Tensor, away: bool = True) -> Tensor | _Kept:
        """What stands for a tensor until the backward pass; the same for the same tensor."""
        small = x.numel() * x.element_size() < self.least
        if small or x.device.type != self.device.type or isinstance(x, nn.Parameter) or not x.is_contiguous():
            return x
        known = self._known(x)
        if known is not None:
            return known
        while self._order and self._order[-1]() is None:
            self._order.pop()
        if not self._order:  # another step begins
            self._shared.clear()
        source, place = x.detach(), self.stack.take(x) if away else None
        kept = _Kept(len(self._order), self._layer, None if away else source, place, self.stack)
        if place is not None:
            self._send(source, place)
        self._order.append(weakref.ref(kept))
        storage = x.untyped_storage()
        self._shared[storage._cdata] = StorageWeakRef(storage), view_of(x), weakref.ref(kept)
        return kept

    def unpack(self, kept: Tensor | _Kept) -> Tensor:
        """The tensor again; the next one of the layer before is set on its way."""
        if isinstance(kept, Tensor):
            return kept
        self._let_go(0)
        x, arrived = self._bring(kept)
        if arrived is not None:
            self.wait(arrived)
        kept.asked = True
        if kept.away is not None:
            kept.here = kept.arrived = None  # whoever asked holds it now
        following = self._following(kept)
        if following is not None:
            self._bring(following)
        return x

    def _following(self, kept: _Kept) -> _Kept | None:
        """The nearest tensor before one that is still away, of its layer or of the one that goes backward next.

        Not one that was asked for: autograd may hold its place still. As a layer asks for each of its tensors once, all
        of the next layer are on their way when it is over, and none of those after that.
        """
        layer = kept.layer
        for ref in reversed(self._order[: kept.number]):
            one = ref()
            if one is None or one.asked:
                continue
            if one.layer < layer < kept.layer:
                return None
            layer = one.layer
            if one.here is None:
                return one
        return None

    def wait(self, copied: Any) -> None:
        """Lets kernels that come wait for a copy, by the event after it. Benchmarks put a timed one in its place."""
        torch.cuda.current_stream(self.device).wait_event(copied)

    def close(self) -> None:
        """Waits for copies that are under way and gives the host's memory back. No graph may be left."""
        self._let_go(0)
        if self._stream is not None:
            self._stream.synchronize()
        self.stack.close()

    def _known(self, x: Tensor) -> _Kept | None:
        found = self._shared.get(x.untyped_storage()._cdata)
        if found is None:
            return None
        storage, view, ref = found
        # A storage that died may have left its number to another one.
        return ref() if not storage.expired() and view == view_of(x) else None

    def _send(self, source: Tensor, place: _Place) -> None:
        if self._stream is None:
            place.memory.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            place.memory.copy_(source, non_blocking=True)
            left = self._stream.record_event()
        # Held until the copy is over, so that the memory is free at a known place in the kernels' order;
        # `record_stream` would free it whenever the allocator happens to look.
        self._leaving.append((source, left))
        self._let_go(IN_FLIGHT)

    def _let_go(self, most: int) -> None:
        """Frees what has left the device, all but so many; kernels wait for copies that are not over."""
        while len(self._leaving) > most:
            _, left = self._leaving.popleft()
            self.wait(left)

    def _bring(self, kept: _Kept) -> tuple[Tensor, Any]:
        """The tensor on the device, perhaps before its data, and the event of its arrival."""
        if kept.here is None:
            assert kept.away is not None
            kept.here = torch.empty_like(kept.away.memory, device=self.device)
            if self._stream is None:
                kept.here.copy_(kept.away.memory)
            else:
                self._stream.wait_stream(torch.cuda.current_stream(self.device))  # for whoever had this memory
                with torch.cuda.stream(self._stream):
                    kept.here.copy_(kept.away.memory, non_blocking=True)
                    kept.arrived = self._stream.record_event()
        return kept.here, kept.arrived


def view_of(x: Tensor) -> tuple[Any, ...]:
    """What a tensor is beside its storage."""
    return x.storage_offset(), x.shape, x.stride(), x.dtype, x._version
