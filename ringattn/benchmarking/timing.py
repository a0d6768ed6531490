"""Measuring a step of all ranks: the slowest rank's time, the median of several runs."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Timer:
    """How steps are timed: runs of `calls` steps one after another, as a model's layers make them.

    The first `warmups` runs compile and fill caches. Collective over all ranks.
    """

    device: torch.device
    calls: int = 4
    repeats: int = 5
    warmups: int = 2

    def milliseconds(self, steps: Sequence[Callable[[], Any]]) -> list[float]:
        """Of one call of each step: of every run the slowest rank's, of all runs the median.

        The steps take turns, so that clocks and temperature are the same for all.
        """
        if not steps:
            return []
        rounds = []
        for number in range(self.warmups + self.repeats):
            took = [self._run(step) for step in steps]
            if number >= self.warmups:
                rounds.append(took)
        slowest = torch.tensor(rounds, device=self.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return [statistics.median(found) for found in slowest.T.tolist()]

    def _run(self, step: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            dist.barrier()
            start = time.perf_counter()
            for _ in range(self.calls):
                step()
            return (time.perf_counter() - start) * 1e3 / self.calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        dist.barrier()
        begin.record()
        for _ in range(self.calls):
            step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / self.calls


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """Memory that a step takes beside what is allocated already: the most of all ranks; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    found = torch.tensor(torch.cuda.max_memory_allocated() - before, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found.item())
