"""Every contestant on every workload: checked against the kernel alone, then timed. Collective over all ranks."""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from ringattn.benchmarking.contestants import Contestant, Entry
from ringattn.benchmarking.problem import LIMITS, Problem
from ringattn.benchmarking.timing import Timer, peak_bytes

CEILING = "kernel alone"


@dataclass(frozen=True)
class Result:
    """One line of the report.

    Arguments:
        forward, both: milliseconds of a forward pass, and of forward and backward, on the slowest rank.
        rate_forward, rate_both: TFLOP/s per GPU by mask area, the backward pass counted as 2.5 forward passes.
        share_forward, share_both: of the kernel alone on an even share of the heads, in the same run.
        exposed: milliseconds of `both` that are gone without transfers.
        planning: milliseconds of layout and plan, once a batch.
        memory: peak of forward and backward, over the bytes of inputs, output and gradients.
        choice: what the planner made of it. error: the largest difference to the kernel alone.
        failure: why there are no numbers.
    """

    workload: str
    contestant: str
    forward: float | None = None
    both: float | None = None
    rate_forward: float | None = None
    rate_both: float | None = None
    share_forward: float | None = None
    share_both: float | None = None
    exposed: float | None = None
    planning: float | None = None
    memory: float | None = None
    choice: str = ""
    error: float | None = None
    failure: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    problems: Sequence[Callable[[], Problem]], contestants: Sequence[Contestant], timer: Timer
) -> Iterator[Result]:
    """Results one after another, the kernel alone first in every workload.

    Arguments:
        problems: makers of problems, called one at a time so that only one is in memory.
    """
    for make in problems:
        problem = make()
        ceiling = _ceiling(problem, timer)
        yield ceiling
        for contestant in contestants:
            yield _measured(problem, contestant, timer, ceiling)
        del problem
        _free()


def _ceiling(problem: Problem, timer: Timer) -> Result:
    share = problem.share
    forward, both = timer.milliseconds(share.forward), timer.milliseconds(share.both)
    rates = _rate(problem, 1.0, forward), _rate(problem, 3.5, both)
    return Result(problem.workload.name, CEILING, forward, both, rates[0], rates[1], 1.0, 1.0)


def _measured(problem: Problem, contestant: Contestant, timer: Timer, ceiling: Result) -> Result:
    name = problem.workload.name
    reason = contestant.missing(problem)
    if reason is not None:
        return Result(name, contestant.name, failure=reason)
    entry = contestant.enter(problem)
    errors = problem.errors(entry.layout, entry.both())
    error = max(errors.values())
    if not error <= LIMITS[problem.tensors[0].dtype]:
        told = ", ".join(f"{key} {value:.2g}" for key, value in errors.items())
        return Result(name, contestant.name, failure=f"differs from the kernel alone: {told}", error=error)
    result = _timed(problem, contestant.name, entry, timer, ceiling, error)
    del entry
    _free()
    return result


def _timed(problem: Problem, name: str, entry: Entry, timer: Timer, ceiling: Result, error: float) -> Result:
    forward, both = timer.milliseconds(entry.forward), timer.milliseconds(entry.both)
    silent = None if entry.silent is None else timer.milliseconds(entry.silent)
    *inputs, dout = entry.inputs
    # out and dout, and each of q, k, v with its gradient
    needed = 2 * sum(x.nbytes for x in inputs) + 2 * dout.nbytes
    peak = peak_bytes(entry.both, problem.device)
    given = sum(x.nbytes for x in entry.inputs)
    assert ceiling.forward is not None
    assert ceiling.both is not None
    return Result(
        problem.workload.name,
        name,
        forward,
        both,
        _rate(problem, 1.0, forward),
        _rate(problem, 3.5, both),
        ceiling.forward / forward,
        ceiling.both / both,
        exposed=None if silent is None else both - silent,
        planning=entry.planning_ms,
        memory=(peak + given) / needed if peak and needed else None,
        choice=entry.choice,
        error=error,
    )


def _rate(problem: Problem, passes: float, milliseconds: float) -> float:
    """TFLOP/s per GPU."""
    return problem.flops(passes) / dist.get_world_size() / milliseconds * 1e-9


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
