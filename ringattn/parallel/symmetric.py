"""Exchanges inside one NVLink domain without collectives: every rank reads its messages out of the memory of its peers.

Copy engines do it beside the kernels, so that no SM is taken from the attention that runs meanwhile; short messages are
pulled by one kernel, which costs the host a fifth of the time. `torch.distributed._symmetric_memory` maps the message
buffers of all ranks into each other and has the barrier that says when they are filled.
"""

import ctypes
import importlib.util
import itertools
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.cuda import Event

from ringattn.kernels.spec import to_device
from ringattn.parallel.memory import half_bytes
from ringattn.parallel.plan import Route
from ringattn.parallel.transport import GroupTransport, Transport

UNIT = 16  # bytes that a pull moves at once
PULLED = 8 << 20  # bytes that a rank sends at most, below which messages are pulled: 30 µs on the wire


class SymmetricTransport:
    """The all-to-all by reads. Buffers are made at the first exchange that needs larger ones, collectively.

    Constraints: one host, CUDA devices that reach each other's memory, and exchanges of one axis in one order on all
    ranks. Copies run on a stream of their own, pulls on the current one. There are two message buffers in turn: the
    second exchange after this one may write where this one's peers have read, which their barrier in between says that
    they have.

    A CUDA graph is replayed when the host does not know whose turn it is. So a capture begins with a barrier that says
    that all have read whatever was there, and after the first capture so does every exchange outside of one.
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
        self._table = torch.empty(0)  # the same on the device
        self._given = False  # a buffer that was not sent yet
        self._pull: _Pull | None = None  # that has not begun
        self._copying: set[int] = set()  # halves whose copies nobody has waited for
        self._clear_on: int | None = None  # a stream behind the last barrier
        self.pulled = PULLED
        self._capture = 0  # the number of the last one
        self._of_graphs: list[tuple[Tensor, Tensor, Any]] = []  # smaller buffers, whose addresses are in graphs
        self._filled, self._read = Event(), Event()
        self._free, self._done = (Event(), Event()), (Event(), Event())  # of each half: may be written; was received

    def buffer(self, route: Route, like: Tensor) -> Tensor:
        assert not self._given, "a message is sent before the next one is written"
        if self._pull is not None:
            self._pull.begin()
        size = route.sent * like.element_size()
        self._ensure(route.most * like.element_size())
        self._given = True
        self._clear(self._pulls(route, like.element_size()))
        start = self._turn * self._half
        return self._memory[start : start + size].view(like.dtype)

    def _clear(self, pulled: bool) -> None:
        """The current stream goes on when this turn's half may be written."""
        stream = _raw_stream()
        capture = _capture(stream)
        new = capture != self._capture  # what came before is no part of it, nor may it be waited for
        if self._clear_on not in (None, stream) and not (capture and new):
            torch.cuda.current_stream().wait_stream(torch.cuda.ExternalStream(self._clear_on))
        if new or (self._capture and not capture):
            self._capture = capture or self._capture
            if pulled and not self._copying:
                self._handle.barrier(channel=0)
            else:
                self._barrier()
                self._read.record(self._stream)
                self._read.wait()
        elif self._clear_on is None:
            self._free[self._turn].wait()

    def message(self, x: Tensor, route: Route) -> Tensor:
        # An empty tensor, of a rank without heads or rows, has no address.
        if self._given and (not x.numel() or x.data_ptr() == self._memory.data_ptr() + self._turn * self._half):
            return x
        return self.buffer(route, x).copy_(x)

    def exchange(self, send: Tensor, receive: Tensor, route: Route) -> "_Copies | _Pull":
        assert (send.numel(), receive.numel()) == (route.sent, route.received), (send.shape, receive.shape, route)
        half, self._turn = self._turn, 1 - self._turn
        self._given, self._clear_on = False, None
        if self._pulls(route, send.element_size()):
            self._pull = _Pull(self, half, receive, route)
            return self._pull
        self._barrier()
        # From here on all peers have read what they were sent before this exchange: the other half is free.
        self._free[self._turn].record(self._stream)
        copy, stream = _memcpy(), self._stream.cuda_stream
        item, start, target = send.element_size(), half * self._half, receive.data_ptr()
        for step in range(self.ranks):  # every rank begins with another peer, so that no port serves two
            peer = (self.rank + step) % self.ranks
            size = route.receives[peer] * item
            if size:
                source = self._addresses[peer] + start + route.there[peer] * item
                copy(target + route.begins[peer] * item, source, size, stream)
        self._done[half].record(self._stream)
        self._copying.add(half)
        return _Copies(self, half, receive)

    def _pulls(self, route: Route, item: int) -> bool:
        """Whether the messages of a route, of elements of so many bytes, are pulled."""
        return route.most * item <= self.pulled and route.grain * item % UNIT == 0 and _puller() is not None

    def wait(self, half: int) -> None:
        """The current stream goes on when the copies out of a half are done."""
        self._done[half].wait()
        self._copying.discard(half)
        if half != self._turn and self._pull is None:  # they were the last, and behind their barrier
            self._clear_on = _raw_stream()

    def pull(self, half: int, receive: Tensor, route: Route) -> None:
        """On the current stream, behind what was copied before."""
        for copying in self._copying:
            self._done[copying].wait()
        self._handle.barrier(channel=0)
        self._clear_on = _raw_stream()
        table, longest = _units(route, receive)
        _puller()(self._table, table, receive, half * self._half // UNIT, self.rank, longest)

    def _barrier(self) -> None:
        """All ranks have come to this point of the current stream before anything more runs on the stream of copies."""
        current = torch.cuda.current_stream()
        self._filled.record(current)
        self._filled.wait(self._stream)
        torch.cuda.set_stream(self._stream)
        try:
            self._handle.barrier(channel=0)
        finally:
            torch.cuda.set_stream(current)

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
        if self._capture:  # but graphs will
            self._of_graphs.append((self._memory, self._table, self._handle))
        self._allocate(most)
        self._open()

    def _allocate(self, most: int) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self._half = half_bytes(most)
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
        self._table = torch.tensor(self._addresses, device=self._memory.device)


class _Copies:
    """Copies under way into a tensor that is kept until they are done."""

    def __init__(self, transport: SymmetricTransport, half: int, receive: Tensor) -> None:
        self._transport, self._half, self._receive = transport, half, receive

    def wait(self) -> None:
        self._transport.wait(self._half)


class _Pull:
    """Messages that are pulled when they are waited for, or before the next ones are written: on the stream of that,
    which must be behind the one that wrote this rank's."""

    def __init__(self, transport: SymmetricTransport, half: int, receive: Tensor, route: Route) -> None:
        self._transport, self._half, self._receive, self._route = transport, half, receive, route

    def begin(self) -> None:
        self._transport._pull = None
        self._transport.pull(self._half, self._receive, self._route)

    def wait(self) -> None:
        if self._transport._pull is self:
            self.begin()


def _units(route: Route, like: Tensor) -> tuple[Tensor, int]:
    """Where messages begin in what peers send and in what is received, and their sizes: (peers, 3) in units, on the
    device; and the largest size. Made once, before a graph is captured."""
    kept: dict[Any, tuple[Tensor, int]] = route.__dict__.setdefault("_units", {})
    key = like.element_size(), like.device
    if key not in kept:
        rows = torch.tensor([route.there, route.begins, route.receives]).T.contiguous() * like.element_size() // UNIT
        kept[key] = to_device(rows, like.device), int(rows[:, 2].max())
    return kept[key]


@cache
def _puller() -> Any:
    """The kernel, or None without Triton."""
    try:
        from ringattn.kernels.pull_triton import pull
    except ImportError:
        return None
    return pull


def _raw_stream() -> int:
    """The current stream's handle; asking for it costs a tenth of making a `torch.cuda.Stream`."""
    stream: int = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
    return stream


_uncounted = itertools.count(1 << 62)


def _capture(stream: int) -> int:
    """The number of the capture that the current stream is in; 0 if it is in none, as the default stream always is.

    The driver counts captures. Should it not tell, each answer is another one: a barrier more for each exchange.
    """
    if stream == 0 or not torch.cuda.is_current_stream_capturing():
        return 0
    status, number = ctypes.c_int(), ctypes.c_uint64()
    ask = _driver("cuStreamGetCaptureInfo_v2", ctypes.c_void_p, *[ctypes.c_void_p] * 5)
    failed = ask is None or ask(stream, ctypes.byref(status), ctypes.byref(number), None, None, None)
    return next(_uncounted) if failed else number.value + 1


@cache
def _driver(name: str, *arguments: Any) -> Any:
    """A function of CUDA's driver, which returns 0 for success; None if it has none of that name."""
    function = getattr(ctypes.CDLL("libcuda.so.1"), name, None)
    if function is not None:
        function.argtypes, function.restype = arguments, ctypes.c_int
    return function


@cache
def _memcpy() -> Callable[[int, int, int, int], None]:
    """The driver's asynchronous copy of bytes: target, source, size, stream. The host time of one is a tenth of that of
    `Tensor.copy_`, and an exchange has one for every peer."""
    function = _driver("cuMemcpyAsync", ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)

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
    for step in (lambda: transport._allocate(1), transport._open, lambda: _probe(transport)):
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
