"""Whether the ranks of a group can read each other's memory: looked at, and then tried."""

import importlib.util
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ringattn.parallel.plan.route import Route
from ringattn.parallel.transport.buffers import SMALLEST
from ringattn.parallel.transport.peer_memory import PeerMemory
from ringattn.parallel.transport.symmetric import SymmetricTransport


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
