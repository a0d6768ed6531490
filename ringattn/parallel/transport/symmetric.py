"""Exchanges inside one NVLink domain without collectives: every rank reads its messages out of the memory of its peers.

Copy engines do it beside the kernels, so that no SM is taken from the attention that runs meanwhile; short messages are
pulled by one kernel, which takes the host less than half the time. The message buffers of all ranks are mapped into
each other, and have a barrier that says when they are filled.
"""

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.cuda import Event

from ringattn.kept import kept
from ringattn.kernels.spec import to_device
from ringattn.parallel.plan.route import Route
from ringattn.parallel.transport.buffers import PULLED, half_bytes
from ringattn.parallel.transport.collective import GroupTransport
from ringattn.parallel.transport.cuda_driver import capture_number, memcpy, raw_stream
from ringattn.parallel.transport.peer_memory import PeerMemory
from ringattn.parallel.transport.process_groups import CLOSED
from ringattn.parallel.transport.protocol import Transport

UNIT = 16  # bytes that a pull moves at once


class _Half:
    """One of a rank's two message buffers."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.given = False  # to be written, and not sent yet
        self.copying = False  # by peers, which nobody has waited for
        self.free, self.received = Event(), Event()  # it may be written again; copies out of the peers' are done


class _CopyStream:
    """The stream on which copies run beside kernels, ahead of them where both are ready."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream(priority=-1)
        self._filled, self._read = Event(), Event()

    def meet(self, memory: PeerMemory) -> None:
        """All ranks have come to this point of the current stream before anything more runs on the stream of copies."""
        current = torch.cuda.current_stream()
        self._filled.record(current)
        self._filled.wait(self.stream)
        torch.cuda.set_stream(self.stream)
        try:
            memory.barrier()
        finally:
            torch.cuda.set_stream(current)

    def join(self) -> None:
        """The current stream goes on when all that runs on this one is done."""
        self._read.record(self.stream)
        self._read.wait()


class _Captures:
    """The CUDA graphs that exchanges were captured in."""

    def __init__(self) -> None:
        self._last = 0  # its number
        self._outgrown: list[PeerMemory] = []

    def begins(self, number: int) -> bool:
        """Whether an exchange in the capture of this number (0: in none) knows nothing of the one before: the first of
        a capture, and each outside of one since there are graphs, which may have been replayed in between."""
        new = number != self._last
        self._last = number or self._last
        return new

    def keep(self, memory: PeerMemory) -> None:
        """Let buffers live that are replaced by larger ones, if graphs have their addresses."""
        if self._last:
            self._outgrown.append(memory)


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
        self.pulled = PULLED
        self._memory = memory
        self._captures = _Captures()
        self._copies = _CopyStream()
        self._half, self._other = _Half(0), _Half(1)  # the half whose turn it is comes first
        self._pull: _Pull | None = None  # that has not begun
        self._behind_barrier: int | None = None  # the stream of the last one, if nothing is under way beside it

    def close(self) -> None:
        if self._memory is not None and dist.is_initialized():
            torch.cuda.synchronize()
            dist.barrier(self.group)  # nobody reads the buffers any more
        self.closed, self._memory, self._captures = True, None, _Captures()
        del self.group

    def buffer(self, route: Route, like: Tensor) -> Tensor:
        if self.closed:
            raise ValueError(CLOSED)
        assert not self._half.given, "a message is sent before the next one is written"
        if self._pull is not None:
            self._pull.begin()
        memory = self._large_enough(route.most * like.element_size())
        self._half.given = True
        self._wait_until_free(memory, self._pulls(route, like.element_size()))
        start = self._half.number * memory.half
        return memory.own[start : start + route.sent * like.element_size()].view(like.dtype)

    def _wait_until_free(self, memory: PeerMemory, pulled: bool) -> None:
        """The current stream goes on when this turn's half may be written."""
        stream, behind = raw_stream(), self._behind_barrier
        capture = capture_number(stream)
        begins = self._captures.begins(capture)
        # What came before a capture is no part of it, and may not be waited for in it.
        if behind not in (None, stream) and not (capture and begins):
            torch.cuda.current_stream().wait_stream(torch.cuda.ExternalStream(behind))
        if begins and pulled and not (self._half.copying or self._other.copying):
            memory.barrier()
        elif begins:
            self._copies.meet(memory)
            self._copies.join()
        elif behind is None:
            self._half.free.wait()

    def message(self, x: Tensor, route: Route) -> Tensor:
        # An empty tensor, of a rank without heads or rows, has no address.
        if self._half.given and (not x.numel() or x.data_ptr() == self._address(self._half)):
            return x
        return self.buffer(route, x).copy_(x)

    def _address(self, half: _Half) -> int:
        assert self._memory is not None
        return self._memory.own.data_ptr() + half.number * self._memory.half

    def exchange(self, send: Tensor, receive: Tensor, route: Route) -> "_Copies | _Pull":
        assert (send.numel(), receive.numel()) == (route.sent, route.received), (send.shape, receive.shape, route)
        memory = self._memory
        assert memory is not None, "a message is written to a buffer of the transport"
        half, self._half, self._other = self._half, self._other, self._half
        half.given, self._behind_barrier = False, None
        if self._pulls(route, send.element_size()):
            self._pull = _Pull(self, half, receive, route)
            return self._pull
        self._copies.meet(memory)
        stream = self._copies.stream
        # From here on all peers have read what they were sent before this exchange: the other half is free.
        self._half.free.record(stream)
        copy, item, start, target = memcpy(), send.element_size(), half.number * memory.half, receive.data_ptr()
        for step in range(self.ranks):  # every rank begins with another peer, so that no port serves two
            peer = (self.rank + step) % self.ranks
            size = route.receives[peer] * item
            if size:
                source = memory.addresses[peer] + start + route.there[peer] * item
                copy(target + route.begins[peer] * item, source, size, stream.cuda_stream)
        half.received.record(stream)
        half.copying = True
        return _Copies(self, half, receive)

    def _pulls(self, route: Route, item: int) -> bool:
        """Whether the messages of a route, of elements of so many bytes, are pulled."""
        return route.most * item <= self.pulled and route.grain * item % UNIT == 0 and _puller() is not None

    def wait(self, half: _Half) -> None:
        """The current stream goes on when the copies out of a half are done."""
        half.received.wait()
        half.copying = False
        if half is self._other and self._pull is None:  # they were the last, and behind their barrier
            self._behind_barrier = raw_stream()

    def pull(self, half: _Half, receive: Tensor, route: Route) -> None:
        """On the current stream, behind what was copied before."""
        for one in (self._half, self._other):
            if one.copying:
                one.received.wait()
        memory = self._memory
        assert memory is not None
        memory.barrier()
        self._behind_barrier = raw_stream()
        table, longest = _units(route, receive)
        _puller()(memory.table, table, receive, half.number * memory.half // UNIT, self.rank, longest)

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
        dist.barrier(self.group)  # nobody reads the old buffers any more, but for graphs
        if memory is not None:
            self._captures.keep(memory)
        self._memory = PeerMemory(half_bytes(most))
        self._memory.open(self.group)
        return self._memory


class _Copies:
    """Copies under way into a tensor that is kept until they are done."""

    def __init__(self, transport: SymmetricTransport, half: _Half, receive: Tensor) -> None:
        self._transport, self._half, self._receive = transport, half, receive

    def wait(self) -> None:
        self._transport.wait(self._half)


class _Pull:
    """Messages that are pulled when they are waited for, or before the next ones are written: on the stream of that,
    which must be behind the one that wrote this rank's."""

    def __init__(self, transport: SymmetricTransport, half: _Half, receive: Tensor, route: Route) -> None:
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
