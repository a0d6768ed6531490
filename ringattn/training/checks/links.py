"""How fast the links are that a run sends keys and heads over, compared with each other while it goes on.

A slow link makes nobody's own time longer: all wait for it. So each pair of a sequence group measures its link now and
then, pair after pair as in a tournament, so that no measurement disturbs another's.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from ringattn.parallel.mesh.tournament import opponents

SIZE = 1 << 20  # bytes each way
TRIES = 3
SLOW = 2.0  # times the usual time
HARMLESS = {"cuda": 1e-4, "cpu": 2e-3}  # seconds by which links may differ


@dataclass(frozen=True)
class LinkTime:
    """Seconds that a message took both ways between two ranks, the slower side's word.

    Arguments:
        inside: both are on one machine.
    """

    ranks: tuple[int, int]
    seconds: float
    inside: bool


def measure_links(group: dist.ProcessGroup, device: torch.device) -> list[float]:
    """Seconds of an exchange with each rank of a group, by their order; 0 for this one. Collective in the group."""
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    out, into = (torch.zeros(SIZE, dtype=torch.uint8, device=device) for _ in range(2))
    found = [0.0] * count
    for peer in opponents(rank, count):
        found[peer] = min(_exchange(out, into, peer, group) for _ in range(TRIES))
    return found


def _exchange(out: torch.Tensor, into: torch.Tensor, peer: int, group: dist.ProcessGroup) -> float:
    _settle(out.device)
    began = time.perf_counter()
    both = [dist.P2POp(dist.isend, out, group=group, group_peer=peer)]
    both += [dist.P2POp(dist.irecv, into, group=group, group_peer=peer)]
    for work in dist.batch_isend_irecv(both):
        work.wait()
    _settle(out.device)
    return time.perf_counter() - began


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def links_of(rows: Sequence[Sequence[float]], groups: Sequence[Sequence[int]], hosts: Sequence[str]) -> list[LinkTime]:
    """All links, each once.

    Arguments:
        rows: by rank, what `measure_links` gave.
        groups: by rank, the ranks of its group in order.
        hosts: by rank.
    """
    found: dict[tuple[int, int], float] = {}
    for rank, (row, group) in enumerate(zip(rows, groups, strict=True)):
        for peer, seconds in zip(group, row, strict=True):
            if peer != rank:
                pair = (min(rank, peer), max(rank, peer))
                found[pair] = max(seconds, found.get(pair, 0.0))
    return [LinkTime(pair, seconds, hosts[pair[0]] == hosts[pair[1]]) for pair, seconds in sorted(found.items())]


def slowest_link(links: Sequence[LinkTime], kind: str) -> dict[str, Any] | None:
    """The link that is furthest behind those like it, inside machines or between them; None where there is none.

    Arguments:
        kind: of the devices.
    """
    usual = {
        inside: median([one.seconds for one in links if one.inside is inside] or [0.0]) for inside in (True, False)
    }
    if not links:
        return None
    worst = max(links, key=lambda one: one.seconds - usual[one.inside])
    like = usual[worst.inside]
    return {
        "ranks": list(worst.ranks),
        "seconds": round(worst.seconds, 6),
        "usual": round(like, 6),
        "GB_per_s": round(SIZE / worst.seconds / 1e9, 3),
        "slow": worst.seconds > max(SLOW * like, like + HARMLESS.get(kind, HARMLESS["cpu"])),
    }
