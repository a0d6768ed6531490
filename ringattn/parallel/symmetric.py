"""Exchanges inside one NVLink domain by copy engines: every rank reads its messages out of the memory of its peers.

No kernel moves data, so no SM is taken from the attention that runs meanwhile. `torch.distributed._symmetric_memory`
maps the message buffers of all ranks into each other and has the barrier that says when they are filled.
"""

import ctypes
import importlib.util
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.cuda import Event

from ringattn.parallel.plan import Route
from ringattn.parallel.transport import GroupTransport, Transport

SMALLEST = 1 << 20  # bytes of a half


class SymmetricTransport:
    """The all-to-all by copy engines. Buffers are made at the first exchange that needs larger ones, collectively.

    Constraints: one host, CUDA devices that reach each other's memory, and exchanges of one axis in one order on all
    ranks. Copies run on a stream of their own. There are two message buffers in turn: the second exchange after this
    one may write where this one's peers have read, which their barrier in between says that they have.

    In a step that is captured in a CUDA graph, and ever after, the host does not know whose turn it was: a barrier
    before each message is written says that all have read what was there.
    """

    name = "copy"
    reason = ""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self._stream = torch.cuda.Stream(priority=-1)
        self._half = 0  # bytes
        self._turn = 0
        self._handle: Any = None
        self._memory = torch.empty(0)
        self._addresses: list[int] = []  # of each rank's memory
        self._given = False  # a buffer that was not sent yet
        self._waited: int | None = None  # the stream that waited for the last exchange
        self._captured = False
        self._of_graphs: list[tuple[Tensor, Any]] = []  # smaller buffers, whose addresses are in graphs
        self._filled, self._read = Event(), Event()
        self._free, self._done = (Event(), Event()), (Event(), Event())  # of each half: may be written; was received

    def buffer(self, route: Route, like: Tensor) -> Tensor:
        assert not self._given, "a message is sent before the next one is written"
        size = route.sent * like.element_size()
        self._ensure(route.most * like.element_size())
        self._given = True
        self._clear()
        start = self._turn * self._half
        return self._memory[start : start + size].view(like.dtype)

    def _clear(self) -> None:
        """The current stream goes on when this turn's half may be written."""
        stream = _raw_stream()
        if self._captured or _capturing(stream):
            self._captured = True
            self._all_have_read()
        elif stream != self._waited:  # else the wait for the last copies was one for the barrier before them
            self._free[self._turn].wait()

    def message(self, x: Tensor, route: Route) -> Tensor:
        if self._given and x.data_ptr() == self._memory.data_ptr() + self._turn * self._half:
            return x
        return self.buffer(route, x).copy_(x)

    def exchange(self, send: Tensor, receive: Tensor, route: Route) -> "_Copies":
        assert (send.numel(), receive.numel()) == (route.sent, route.received), (send.shape, receive.shape, route)
        item, half = send.element_size(), self._turn
        self._turn, self._given, self._waited = 1 - half, False, None
        self._barrier(self._filled)
        # From here on all peers have read what they were sent before this exchange: the other half is free.
        self._free[self._turn].record(self._stream)
        copy, stream = _memcpy(), self._stream.cuda_stream
        start, target = half * self._half, receive.data_ptr()
        for step in range(self.ranks):  # every rank begins with another peer, so that no port serves two
            peer = (self.rank + step) % self.ranks
            size = route.receives[peer] * item
            if size:
                source = self._addresses[peer] + start + route.there[peer] * item
                copy(target + route.begins[peer] * item, source, size, stream)
        self._done[half].record(self._stream)
        return _Copies(self, half, receive)

    def wait(self, half: int) -> None:
        """The current stream goes on when the copies out of a half are done."""
        self._done[half].wait()
        if half != self._turn:  # they were the last
            self._waited = _raw_stream()

    def _barrier(self, reached: Event) -> None:
        """All ranks have come to this point of the current stream before anything more runs on the stream of copies."""
        current = torch.cuda.current_stream()
        reached.record(current)
        reached.wait(self._stream)
        torch.cuda.set_stream(self._stream)
        try:
            self._handle.barrier(channel=0)
        finally:
            torch.cuda.set_stream(current)

    def _all_have_read(self) -> None:
        """The current stream goes on when all ranks have made their copies up to here."""
        self._barrier(self._filled)
        self._read.record(self._stream)
        self._read.wait()

    def _ensure(self, most: int) -> None:
        """Buffers for messages of so many bytes on all ranks. Growing is rare, as sizes are powers of two; it is
        collective and waits for the device."""
        if self._handle is not None and most <= self._half:
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"message buffers of {self._half} bytes cannot grow to {most} while a CUDA graph is captured: run the "
                "step before with the same layout"
            )
        torch.cuda.synchronize()
        dist.barrier(self.group)  # nobody reads the old buffers any more
        if self._captured:  # but graphs will
            self._of_graphs.append((self._memory, self._handle))
        self._allocate(most)
        self._open()

    def _allocate(self, most: int) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self._half = max(SMALLEST, 1 << (most - 1).bit_length())
        self._handle, self._addresses = None, []
        device = torch.device("cuda", torch.cuda.current_device())
        self._memory = symmetric.empty(2 * self._half, dtype=torch.uint8, device=device)

    def _open(self) -> None:
        """Map the memory of all ranks. Collective."""
        import torch.distributed._symmetric_memory as symmetric

        self._handle = symmetric.rendezvous(self._memory, self.group)
        pointers = self._handle.buffer_ptrs
        inside = self._memory.data_ptr() - pointers[self.rank]  # of an allocation, the same on all ranks
        self._addresses = [pointer + inside for pointer in pointers]


class _Copies:
    """Copies under way into a tensor that is kept until they are done."""

    def __init__(self, transport: SymmetricTransport, half: int, receive: Tensor) -> None:
        self._transport, self._half, self._receive = transport, half, receive

    def wait(self) -> None:
        self._transport.wait(self._half)


def _raw_stream() -> int:
    """The current stream's handle; asking for it costs a tenth of making a `torch.cuda.Stream`."""
    stream: int = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
    return stream


def _capturing(stream: int) -> bool:
    """Whether a graph is being captured; never on the default stream."""
    return stream != 0 and torch.cuda.is_current_stream_capturing()


@cache
def _memcpy() -> Callable[[int, int, int, int], None]:
    """The driver's asynchronous copy of bytes: target, source, size, stream. The host time of one is a tenth of that of
    `Tensor.copy_`, and an exchange has one for every peer."""
    function = ctypes.CDLL("libcuda.so.1").cuMemcpyAsync
    function.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    function.restype = ctypes.c_int

    def copy(target: int, source: int, size: int, stream: int) -> None:
        error = function(target, source, size, stream)
        if error:
            raise RuntimeError(f"cuMemcpyAsync of {size} bytes failed with CUDA error {error}")

    return copy


def open_transport(group: dist.ProcessGroup, reason: str) -> Transport:
    """By copy engines, or by the group's all-to-all for a reason."""
    return GroupTransport(group, reason) if reason else SymmetricTransport(group)


def why_not(group: dist.ProcessGroup) -> str:
    """Why this group cannot exchange by copy engines; "" if it can. Collective: the same answer on every rank."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, (_host(), _missing()), group=group)
    if len({host for host, _ in found}) > 1:
        return f"its ranks are on {len({host for host, _ in found})} hosts"
    reason = next((f"rank {rank} {told}" for rank, (_, told) in enumerate(found) if told), "")
    if reason:
        return reason
    transport = SymmetricTransport(group)
    # Each step is agreed upon before the next: a rank that failed would leave the others waiting in it.
    for step in (lambda: transport._allocate(SMALLEST), transport._open, lambda: _probe(transport)):
        dist.all_gather_object(found, _failure(step), group=group)
        reason = next((f"rank {rank}: {told}" for rank, told in enumerate(found) if told), "")
        if reason:
            return reason
    return ""


def _host() -> str:
    """Which machine this is: names alone may be the same on several."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"


def _missing() -> str:
    """What this process lacks."""
    if not torch.cuda.is_available():
        return "has no CUDA device"
    if importlib.util.find_spec("torch.distributed._symmetric_memory") is None:
        return f"has torch {torch.__version__}, which is without symmetric memory"
    here = torch.cuda.current_device()
    others = [device for device in range(torch.cuda.device_count()) if device != here]
    if not all(torch.cuda.can_device_access_peer(here, device) for device in others):
        return "has devices that cannot reach each other's memory"
    return ""


def _probe(transport: SymmetricTransport) -> None:
    """One small exchange, whose result is looked at."""
    ranks, rank = transport.ranks, transport.rank
    route = Route((1,) * ranks, (1,) * ranks, (rank,) * ranks, ranks)
    send = transport.buffer(route, torch.empty(0, device="cuda"))
    send.copy_(torch.arange(ranks, device="cuda") + 100.0 * rank)
    receive = torch.zeros(ranks, device="cuda")
    transport.exchange(send, receive, route).wait()
    expected = [rank + 100.0 * peer for peer in range(ranks)]
    if receive.tolist() != expected:
        raise RuntimeError(f"a probe brought {receive.tolist()} instead of {expected}")


def _failure(run: Callable[[], None]) -> str:
    try:
        run()
    except Exception as error:  # whatever it is, the collective transport does without
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""
