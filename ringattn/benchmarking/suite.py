"""Every contestant on every workload: checked against the kernel alone, then timed. Collective over all ranks."""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.benchmarking.contestants import Contestant, Entry
from ringattn.benchmarking.problem import LIMITS, Problem
from ringattn.benchmarking.slow import Slow
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
        slowed: `both` with ranks that are slowed on purpose, over `both` without, measured beside each other.
        memory: peak of forward and backward, over the bytes of inputs, output and gradients.
        choice: what the planner made of it.
        errors: relative differences of out, dq, dk and dv to the kernel alone. error: the largest.
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
    slowed: float | None = None
    memory: float | None = None
    choice: str = ""
    error: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    failure: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    problems: Sequence[Callable[[], Problem]],
    contestants: Sequence[Contestant],
    timer: Timer,
    slow: Slow | None = None,
) -> Iterator[Result]:
    """Results one after another, the kernel alone first in every workload.

    Arguments:
        problems: makers of problems, called one at a time so that only one is in memory.
        slow: ranks whose slowness is to be priced as well.
    """
    for make in problems:
        yield from _measured(make(), contestants, timer, slow)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _measured(problem: Problem, contestants: Sequence[Contestant], timer: Timer, slow: Slow | None) -> list[Result]:
    entered = [_entered(problem, contestant) for contestant in contestants]
    entries = [entry for entry in entered if isinstance(entry, _Checked)]
    share = problem.share
    forward = timer.milliseconds([share.forward, *(one.entry.forward for one in entries)])
    steps = [share.both, *(one.entry.both for one in entries)]
    both = timer.milliseconds(steps)
    silent = timer.milliseconds([one.entry.silent for one in entries if one.entry.silent is not None])
    slowed: list[float | None] = [None] * len(steps)
    if slow is not None:
        slowed = [*slow.costs(steps, both, share.both, timer)]
    alone = _result(problem, CEILING, (forward[0], both[0]), (forward[0], both[0]))
    results = [replace(alone, slowed=slowed[0], memory=_memory_alone(problem))]
    timed, quiet = iter(zip(forward[1:], both[1:], slowed[1:], strict=True)), iter(silent)
    for one in entered:
        if isinstance(one, Result):
            results.append(one)
            continue
        *took, cost = next(timed)
        result = _result(problem, one.name, (took[0], took[1]), (forward[0], both[0]))
        exposed = None if one.entry.silent is None or result.both is None else result.both - next(quiet)
        result = replace(result, choice=one.entry.choice, planning=one.entry.planning_ms)
        memory = _memory(problem, one.entry.both, one.entry.inputs)
        result = replace(result, exposed=exposed, slowed=cost, memory=memory)
        results.append(replace(result, error=max(one.errors.values()), errors=one.errors))
        one.entry.close()
    return results


@dataclass(frozen=True)
class _Checked:
    """A contestant whose results are right."""

    name: str
    entry: Entry
    errors: dict[str, float]


def _entered(problem: Problem, contestant: Contestant) -> "_Checked | Result":
    name = problem.workload.name
    reason = contestant.missing(problem)
    if reason is not None:
        return Result(name, contestant.name, failure=reason)
    try:
        entry = contestant.enter(problem)
        results = entry.both()
    except Exception as raised:
        # Raised on every rank alike, or the others wait for this one until their time is up.
        if not contestant.peer:
            raise
        return Result(name, contestant.name, failure=f"{type(raised).__name__}: {_line(raised)}")
    errors = problem.errors(entry.layout, results)
    error = max(errors.values())
    if not error <= LIMITS[problem.tensors[0].dtype]:
        entry.close()
        told = ", ".join(f"{key} {value:.2g}" for key, value in errors.items())
        return Result(
            name, contestant.name, failure=f"differs from the kernel alone: {told}", error=error, errors=errors
        )
    return _Checked(contestant.name, entry, errors)


def _line(error: Exception) -> str:
    """The start of a message, fit for a cell of a table."""
    return " ".join(str(error).split()).replace("|", "/")[:200]


def _result(problem: Problem, name: str, took: tuple[float, float], alone: tuple[float, float]) -> Result:
    forward, both = took
    return Result(
        problem.workload.name,
        name,
        forward,
        both,
        _rate(problem, 1.0, forward),
        _rate(problem, 3.5, both),
        alone[0] / forward,
        alone[1] / both,
    )


def _memory(problem: Problem, step: Callable[[], Any], inputs: Sequence[Tensor], held: int = 0) -> float | None:
    """Peak of both passes over what they cannot do without: q, k, v, out and the gradient of each.

    Arguments:
        inputs: q, k, v and dout.
        held: bytes of results that were allocated before the step.
    """
    needed = 2 * sum(x.nbytes for x in inputs)  # dq, dk and dv are as large as q, k and v, and out as dout
    peak = peak_bytes(step, problem.device)
    return (peak + needed // 2 + held) / needed if peak and needed else None


def _memory_alone(problem: Problem) -> float | None:
    """Of the kernel alone: what is more than its inputs and results, the kernel itself takes."""
    share = problem.share
    held = sum(x.nbytes for x in (share.out, *share.grads))
    return _memory(problem, share.both, share.inputs, held)


def _rate(problem: Problem, passes: float, milliseconds: float) -> float:
    """TFLOP/s per GPU."""
    return problem.flops(passes) / dist.get_world_size() / milliseconds * 1e-9
