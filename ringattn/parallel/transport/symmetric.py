"""Exchanges inside one NVLink domain without collectives: every rank reads its messages out of the memory of its peers.

Copy engines do it beside the kernels, so that no SM is taken from the attention that runs meanwhile; short messages are
pulled by one kernel, which takes the host less than half the time. `torch.distributed._symmetric_memory` maps the
message buffers of all ranks into each other and has the barrier that says when they are filled.
"""

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

from ringattn.kept import kept
from ringattn.kernels.spec import to_device
from ringattn.parallel.plan.route import Route
from ringattn.parallel.transport.buffers import PULLED, SMALLEST, half_bytes
from ringattn.parallel.transport.collective import GroupTransport
from ringattn.parallel.transport.cuda_driver import capture_number, memcpy, raw_stream
from ringattn.parallel.transport.process_groups import CLOSED
from ringattn.parallel.transport.protocol import Transport

UNIT = 16  # bytes that a pull moves at once


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

    def __init__(self, group: dist.ProcessGroup, memory: PeerMemory | None = None) -> None:
        self.group = group
        self.closed = False
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self._stream = torch.cuda.Stream(priority=-1)
        self._memory = memory
        self._turn = 0
        self._given = False  # a buffer that was not sent yet
        self._pull: _Pull | None = None  # that has not begun
        self._copying: set[int] = set()  # halves whose copies nobody has waited for
        self._behind_barrier: int | None = None  # a stream that is
        self.pulled = PULLED
        self._capture = 0  # the number of the last one
        self._of_graphs: list[PeerMemory] = []  # with smaller buffers, whose addresses are in graphs
        self._filled, self._read = Event(), Event()
        self._free, self._done = (Event(), Event()), (Event(), Event())  # of each half: may be written; was received

    def close(self) -> None:
        if self._memory is not None and dist.is_initialized():
            torch.cuda.synchronize()
            dist.barrier(self.group)  # nobody reads the buffers any more
        self.closed, self._memory = True, None
        self._of_graphs.clear()
        del self.group

    def buffer(self, route: Route, like: Tensor) -> Tensor:
        if self.closed:
            raise ValueError(CLOSED)
        assert not self._given, "a message is sent before the next one is written"
        if self._pull is not None:
            self._pull.begin()
        memory = self._large_enough(route.most * like.element_size())
        self._given = True
        self._wait_until_free(memory, self._pulls(route, like.element_size()))
        start = self._turn * memory.half
        return memory.own[start : start + route.sent * like.element_size()].view(like.dtype)

    def _wait_until_free(self, memory: PeerMemory, pulled: bool) -> None:
        """The current stream goes on when this turn's half may be written."""
        stream = raw_stream()
        capture = capture_number(stream)
        new = capture != self._capture  # what came before is no part of it, nor may it be waited for
        if self._behind_barrier not in (None, stream) and not (capture and new):
            torch.cuda.current_stream().wait_stream(torch.cuda.ExternalStream(self._behind_barrier))
        if new or (self._capture and not capture):
            self._capture = capture or self._capture
            if pulled and not self._copying:
                memory.barrier()
            else:
                self._barrier(memory)
                self._read.record(self._stream)
                self._read.wait()
        elif self._behind_barrier is None:
            self._free[self._turn].wait()

    def message(self, x: Tensor, route: Route) -> Tensor:
        # An empty tensor, of a rank without heads or rows, has no address.
        if self._given and (not x.numel() or x.data_ptr() == self._address(self._turn)):
            return x
        return self.buffer(route, x).copy_(x)

    def _address(self, half: int) -> int:
        assert self._memory is not None
        return self._memory.own.data_ptr() + half * self._memory.half

    def exchange(self, send: Tensor, receive: Tensor, route: Route) -> "_Copies | _Pull":
        assert (send.numel(), receive.numel()) == (route.sent, route.received), (send.shape, receive.shape, route)
        memory = self._memory
        assert memory is not None, "a message is written to a buffer of the transport"
        half, self._turn = self._turn, 1 - self._turn
        self._given, self._behind_barrier = False, None
        if self._pulls(route, send.element_size()):
            self._pull = _Pull(self, half, receive, route)
            return self._pull
        self._barrier(memory)
        # From here on all peers have read what they were sent before this exchange: the other half is free.
        self._free[self._turn].record(self._stream)
        copy, stream = memcpy(), self._stream.cuda_stream
        item, start, target = send.element_size(), half * memory.half, receive.data_ptr()
        for step in range(self.ranks):  # every rank begins with another peer, so that no port serves two
            peer = (self.rank + step) % self.ranks
            size = route.receives[peer] * item
            if size:
                source = memory.addresses[peer] + start + route.there[peer] * item
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
            self._behind_barrier = raw_stream()

    def pull(self, half: int, receive: Tensor, route: Route) -> None:
        """On the current stream, behind what was copied before."""
        for copying in self._copying:
            self._done[copying].wait()
        memory = self._memory
        assert memory is not None
        memory.barrier()
        self._behind_barrier = raw_stream()
        table, longest = _units(route, receive)
        _puller()(memory.table, table, receive, half * memory.half // UNIT, self.rank, longest)

    def _barrier(self, memory: PeerMemory) -> None:
        """All ranks have come to this point of the current stream before anything more runs on the stream of copies."""
        current = torch.cuda.current_stream()
        self._filled.record(current)
        self._filled.wait(self._stream)
        torch.cuda.set_stream(self._stream)
        try:
            memory.barrier()
        finally:
            torch.cuda.set_stream(current)

    def _large_enough(self, most: int) -> PeerMemory:
        """Buffers for messages of so many bytes on all ranks. Growing is rare, as sizes are powers of two; it is
        collective and waits for the device."""
        memory = self._memory
        if memory is not None and most <= memory.half:
            return memory
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"message buffers cannot grow to {most} bytes while a CUDA graph is captured: run the step before with "
                "the same layout"
            )
        torch.cuda.synchronize()
        dist.barrier(self.group)  # nobody reads the old buffers any more
        if memory is not None and self._capture:  # but graphs will
            self._of_graphs.append(memory)
        self._memory = PeerMemory(half_bytes(most))
        self._memory.open(self.group)
        return self._memory


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
    size, device = like.element_size(), like.device

    def make() -> tuple[Tensor, int]:
        places = torch.tensor([route.there, route.begins, route.receives], device="cpu")
        rows = places.T.contiguous() * size // UNIT
        return to_device(rows, device), int(rows[:, 2].max())

    return kept(route, ("units", size, device), make)


@cache
def _puller() -> Any:
    """The kernel, or None without Triton."""
    try:
        from ringattn.kernels.movement.pull_triton import pull
    except ImportError:
        return None
    return pull


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
    # Each step is agreed upon before the next: a rank that failed would leave the others waiting in it.
    made: list[PeerMemory] = []
    for step in (
        lambda: made.append(PeerMemory(SMALLEST)),
        lambda: made[0].open(group),
        lambda: _probe(SymmetricTransport(group, made[0])),
    ):
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
