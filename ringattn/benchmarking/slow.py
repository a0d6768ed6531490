"""Ranks that are slowed on purpose: what one slow device costs all of them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ringattn.benchmarking.timing import Timer

Step = Callable[[], Any]
PROBE_CYCLES = 5_000_000  # a few milliseconds


@dataclass(frozen=True)
class Slow:
    """`ranks` take `share` longer for every step: they idle for that share of its time before they begin it.

    On a GPU the idling is a kernel on the stream, so the host runs ahead as ever.
    """

    share: float
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.share > 0:
            raise ValueError(f"slow must be > 0 where ranks are slowed, got {self.share}")
        if not self.ranks:
            raise ValueError(f"slow_ranks must name the ranks that slow={self.share} slows, got none")

    def costs(self, steps: Sequence[Step], took: Sequence[float], load: Step, timer: Timer) -> list[float]:
        """Time with slow ranks over time without, of every step. Collective.

        Arguments:
            took: milliseconds of each step, of which the share is taken.
            load: computes on this rank alone, so that a GPU's clock is measured as it is under load.
        """
        idle = _idler(load, timer.device)
        slowed = [
            self._slowed(step, idle, self.share * milliseconds) for step, milliseconds in zip(steps, took, strict=True)
        ]
        times = timer.milliseconds([*steps, *slowed])
        return [slow / plain for plain, slow in zip(times[: len(steps)], times[len(steps) :], strict=True)]

    def _slowed(self, step: Step, idle: Callable[[float], None], milliseconds: float) -> Step:
        if dist.get_rank() not in self.ranks:
            return step

        def slowed() -> None:
            idle(milliseconds)
            step()

        return slowed


def _idler(load: Step, device: torch.device) -> Callable[[float], None]:
    """What keeps this rank's stream busy with nothing for a number of milliseconds."""
    if device.type != "cuda":
        return lambda milliseconds: time.sleep(milliseconds * 1e-3)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1000)  # the first launch loads the kernel
    for _ in range(3):
        load()
    begin.record()
    torch.cuda._sleep(PROBE_CYCLES)
    end.record()
    torch.cuda.synchronize()
    cycles = PROBE_CYCLES / begin.elapsed_time(end)
    return lambda milliseconds: torch.cuda._sleep(int(milliseconds * cycles))
