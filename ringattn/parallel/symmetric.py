"""Exchanges inside one NVLink domain by copy engines: every rank reads its messages out of the memory of its peers.

No kernel moves data, so no SM is taken from the attention that runs meanwhile. `torch.distributed._symmetric_memory`
maps the message buffers of all ranks into each other and has the barrier that says when they are filled.
"""

import importlib.util
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.parallel.plan import Route
from ringattn.parallel.transport import GroupTransport, Transport

SMALLEST = 1 << 20  # bytes of a half


class SymmetricTransport:
    """The all-to-all by copy engines. Buffers are made at the first exchange that needs larger ones, collectively.

    Constraints: one host, CUDA devices that reach each other's memory, and exchanges of one axis in one order on all
    ranks. Copies run on a stream of their own. There are two message buffers in turn: the second exchange after this
    one may write where this one's peers have read, which their barrier in between says that they have.
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
        self._peers: list[Tensor] = []  # all of each rank's memory, as bytes
        self._free: list[torch.cuda.Event | None] = [None, None]  # when each half may be written

    def buffer(self, route: Route, like: Tensor) -> Tensor:
        most = route.most * like.element_size()
        if most > self._half or self._handle is None:
            self._grow(most)
        free = self._free[self._turn]
        if free is not None:
            free.wait()
        start = self._turn * self._half
        size = route.sent * like.element_size()
        return self._peers[self.rank][start : start + size].view(like.dtype)

    def message(self, x: Tensor, route: Route) -> Tensor:
        start = self._turn * self._half
        if self._peers and x.data_ptr() == self._peers[self.rank].data_ptr() + start:
            return x
        return self.buffer(route, x).copy_(x)

    def exchange(self, send: Tensor, receive: Tensor, route: Route) -> "_Copies":
        assert (send.numel(), receive.numel()) == (route.sent, route.received), (send.shape, receive.shape, route)
        base, item = self._turn * self._half, send.element_size()
        self._turn = 1 - self._turn
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._handle.barrier(channel=0)
            # From here on all peers have read what they were sent before this exchange: the other half is free.
            self._free[self._turn] = stream.record_event()
            for step in range(self.ranks):  # every rank begins with another peer, so that no port serves two
                peer = (self.rank + step) % self.ranks
                count = route.receives[peer]
                if count:
                    first = base + route.there[peer] * item
                    message = self._peers[peer][first : first + count * item].view(send.dtype)
                    receive[route.begins[peer] : route.begins[peer] + count].copy_(message, non_blocking=True)
            return _Copies(stream.record_event(), receive)

    def _grow(self, most: int) -> None:
        """Larger buffers on all ranks: rare, sizes are powers of two. Collective, waits for the device."""
        import torch.distributed._symmetric_memory as symmetric

        torch.cuda.synchronize()
        dist.barrier(self.group)  # nobody reads the old buffers any more
        self._half = max(SMALLEST, 1 << (most - 1).bit_length())
        self._peers, self._handle, self._free = [], None, [None, None]
        device = torch.device("cuda", torch.cuda.current_device())
        memory = symmetric.empty(2 * self._half, dtype=torch.uint8, device=device)
        self._handle = symmetric.rendezvous(memory, self.group)
        shape = (2 * self._half,)
        self._peers = [
            memory if peer == self.rank else self._handle.get_buffer(peer, shape, torch.uint8)
            for peer in range(self.ranks)
        ]


class _Copies:
    """Copies under way into a tensor that is kept until they are done."""

    def __init__(self, done: torch.cuda.Event, receive: Tensor) -> None:
        self._done, self._receive = done, receive

    def wait(self) -> None:
        self._done.wait()


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
    dist.all_gather_object(found, _failure(lambda: _probe(group)), group=group)
    return next((f"rank {rank}: {told}" for rank, told in enumerate(found) if told), "")


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


def _probe(group: dist.ProcessGroup) -> None:
    """One small exchange, whose result is looked at."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    transport = SymmetricTransport(group)
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
