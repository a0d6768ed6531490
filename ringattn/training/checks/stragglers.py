"""Ranks that are slower than the others, and links: found by what they themselves take, told on the screen and in a
file."""

import json
import math
import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median_low
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ringattn.training.checks.links import links_of, measure_links, slowest_link
from ringattn.training.checks.own_time import PERIOD, OwnTime, OwnTimes

FILE = "stragglers.jsonl"
# Less than this part of a step is not worth a word, however much it is of a rank's own time.
WORTH = 0.05
KINDS = {"own": "own time", "kernels": "kernels on the GPU", "data": "waiting for data"}


class Stragglers:
    """Compares ranks every so many steps. Made and called by all ranks at the same places; a context manager.

    Arguments:
        output: the run's folder.
        model: whose MLPs are timed.
        device: where this rank computes.
        every: steps between comparisons; 0: none, and nothing is measured.
        percent: a rank is told of when it takes so much more than the median.
        group: of ranks whose links are measured; None for no links.
    """

    def __init__(
        self,
        output: Path,
        model: nn.Module,
        device: torch.device,
        every: int,
        percent: float,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._group = group
        self._groups: list[Any] = []
        self._path, self._device, self._every, self._percent = output / FILE, device, every, percent
        self._hosts: list[Any] | None = None
        self._steps = 0
        self._times = OwnTimes(model, device) if every and dist.get_world_size() > 1 else None

    def __enter__(self) -> "Stragglers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._times is not None:
            self._times.close()

    def step(self) -> AbstractContextManager[None]:
        """Around a step and the wait for its batch."""
        return nullcontext() if self._times is None else self._times.step()

    def done(self, step: int, waited: float, warmup: bool) -> None:
        """After a step: compares the ranks when it is time. Collective.

        Arguments:
            waited: seconds for the step's batch.
            warmup: the step says nothing about the others.
        """
        if self._times is None:
            return
        if warmup:
            self._times.take()
            return
        self._times.waited(waited)
        self._steps += 1
        if step % self._every == 0:
            self.compare(step, self._steps, self._times.take())
            self._steps = 0

    def compare(self, step: int, steps: int, mine: OwnTime) -> list[dict[str, Any]]:
        """Times links and gathers a little; rank 0 tells. Collective. Returns ranks that are behind, slowest first.

        Arguments:
            step: the last of the window.
            steps: of the window.
        """
        world = dist.get_world_size()
        if self._hosts is None:
            self._hosts, self._groups = [None] * world, [None] * world
            peers = [] if self._group is None else dist.get_process_group_ranks(self._group)
            dist.all_gather_object(self._hosts, socket.gethostname())
            dist.all_gather_object(self._groups, peers)
        links = [] if self._group is None else measure_links(self._group, self._device)
        row = torch.tensor([*mine, *links], dtype=torch.float32, device=self._device)
        rows = [torch.empty_like(row) for _ in range(world)]
        dist.all_gather(rows, row)
        told = torch.stack(rows).tolist()
        times = [OwnTime(*one[: len(mine)]) for one in told]
        behind = late(times, self._percent, steps)
        link = slowest_link(links_of([one[len(mine) :] for one in told], self._groups, self._hosts), self._device.type)
        if (behind or (link and link["slow"])) and dist.get_rank() == 0:
            self._tell(step, steps, times, behind, link)
        return behind

    def _tell(
        self,
        step: int,
        steps: int,
        times: Sequence[OwnTime],
        behind: list[dict[str, Any]],
        link: dict[str, Any] | None,
    ) -> None:
        assert self._hosts is not None
        if link is not None:
            link["hosts"] = [self._hosts[rank] for rank in link["ranks"]]
        for one in behind:
            one["host"] = self._hosts[one["rank"]]
        slowest = max(range(len(times)), key=lambda rank: times[rank].data)
        record = {
            "step": step,
            "steps": steps,
            "percent": self._percent,
            "seconds": round(times[0].whole, 6),
            "behind": behind,
            "slowest_data": {"rank": slowest, "host": self._hosts[slowest], "seconds": round(times[slowest].data, 6)},
            "slowest_link": link,
        }
        print(table(record), flush=True)
        try:
            with open(self._path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            print(f"warning: {self._path} cannot be written: {error.strerror}", flush=True)


def late(times: Sequence[OwnTime], percent: float, steps: int) -> list[dict[str, Any]]:
    """Ranks that take more than `percent` longer than the median for anything of their own, slowest first.

    The median of two ranks is the faster one. What a look now and then cannot tell from chance does not count.
    """
    found = []
    for kind, name in KINDS.items():
        usual = median_low([getattr(one, kind) for one in times])
        for rank, one in enumerate(times):
            took = getattr(one, kind)
            chance = 3 * math.sqrt(one.looks + 1) * PERIOD / max(1, steps) if kind == "own" else 0.0
            if took - usual > max(usual * percent / 100, WORTH * one.whole, chance):
                more = round(100 * (took / usual - 1)) if usual > 0 else None
                found.append(
                    {"rank": rank, "what": name, "seconds": round(took, 6), "median": round(usual, 6), "percent": more}
                )
    return sorted(found, key=lambda one: one["median"] - one["seconds"])


def table(record: dict[str, Any]) -> str:
    """For people."""
    lines = []
    if record["behind"]:
        lines += _table_of_ranks(record)
    if link := record["slowest_link"]:
        (a, b), (one, other) = link["ranks"], link["hosts"]
        word = "slow link" if link["slow"] else "slowest link"
        lines.append(
            f"{word} at step {record['step']}: ranks {a} ({one}) and {b} ({other}), {1e3 * link['seconds']:.2f} ms for "
            f"1 MiB both ways, usual {1e3 * link['usual']:.2f} ms"
        )
    return "\n".join(lines)


def _table_of_ranks(record: dict[str, Any]) -> list[str]:
    lines = [
        f"slow ranks over {record['steps']} steps to step {record['step']}, of {record['seconds']:.3f} s each "
        f"(more than {record['percent']:g} % behind the median):",
        f"  {'rank':>5}  {'host':<20}  {'what':<20}  {'s a step':>9}  {'median':>9}  behind",
    ]
    for one in record["behind"]:
        behind = "" if one["percent"] is None else f"{one['percent']} %"
        lines.append(
            f"  {one['rank']:>5}  {one['host']:<20}  {one['what']:<20}  {one['seconds']:>9.4f}  {one['median']:>9.4f}  "
            f"{behind}"
        )
    return lines
