"""Every contestant on every workload: checked against the kernel alone, then timed. Collective over all ranks."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.benchmarking.captured import (
    Captured,
    Graphs,
    Replays,
    Uncaptured,
    ceiling_replays,
    replays,
    uncapturable,
)
from ringattn.benchmarking.contestants import Contestant, Entry, told
from ringattn.benchmarking.problem import LIMITS, Problem
from ringattn.benchmarking.slow import Slow
from ringattn.benchmarking.timing import Timer, peak_bytes

CEILING = "kernel alone"
CAPTURED_CEILING = "kernel alone, captured"


@dataclass(frozen=True)
class Result:
    """One line of the report.

    Arguments:
        forward, both: milliseconds of a forward pass, and of forward and backward, on the slowest rank.
        rate_forward, rate_both: TFLOP/s per GPU by mask area, the backward pass counted as 2.5 forward passes.
        captured: the steps were replays of CUDA graphs.
        share_forward, share_both: of the kernel alone on an even share of the heads, in the same run, captured as well
            if the steps were.
        exposed: milliseconds of `both` that are gone without transfers.
        planning: milliseconds of layout and plan, once a batch.
        slowed: `both` with ranks that are slowed on purpose, over `both` without, measured beside each other.
        memory: peak of forward and backward, over the bytes of inputs, output and gradients. Of captured steps: what
            the graph holds instead of the peak.
        choice: what the planner made of it.
        errors: relative differences of out, dq, dk and dv to the kernel alone. error: the largest.
        failure: why there are no numbers.
    """

    workload: str
    contestant: str
    captured: bool = False
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
    """Results one after another, the kernel alone first in every workload, and captured too if any contestant is.

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
    share = problem.share
    # The last that entered leaves first: what one changes in the process, another of its kind changes again.
    with ExitStack() as stack, closing(Graphs()) as graphs:
        rows = [_entered(problem, contestant, stack) for contestant in contestants]
        if any(isinstance(one, Captured) for one in contestants):
            rows = _captured(problem, contestants, rows, graphs)
        alone = _Checked(Result(problem.workload.name, CEILING), share.forward, share.both, share.inputs)
        return _timed(problem, [alone, *rows], timer, slow)


@dataclass(frozen=True)
class _Checked:
    """Steps whose results are right, and the line of the report as far as it is known before they are timed."""

    line: Result
    forward: Callable[[], Any]
    both: Callable[[], Any]
    inputs: Sequence[Tensor]  # q, k, v and dout
    silent: Callable[[], Any] | None = None
    entry: Entry | None = None  # of a contestant
    held: int | None = None  # bytes that the graph of `both` holds, if it is one


_Row = _Checked | Result  # the latter with a failure


def _entered(problem: Problem, contestant: Contestant, stack: ExitStack) -> _Row:
    line = Result(problem.workload.name, contestant.name, captured=isinstance(contestant, Captured))
    reason = contestant.missing(problem)
    if reason is not None:
        return replace(line, failure=reason)
    try:
        entry = contestant.enter(problem)
        stack.callback(entry.close)
        results = entry.both()
    except Exception as raised:
        # Raised on every rank alike, or the others wait for this one until their time is up.
        if not contestant.peer:
            raise
        return replace(line, failure=told(raised))
    row = _Checked(line, entry.forward, entry.both, entry.inputs, entry.silent, entry)
    return _compared(problem, row, problem.errors(entry.layout, results))


def _captured(problem: Problem, contestants: Sequence[Contestant], rows: Sequence[_Row], graphs: Graphs) -> list[_Row]:
    """The rows, with replays for those that are to be captured, and before them the kernel alone captured."""
    share, line = problem.share, Result(problem.workload.name, CAPTURED_CEILING, captured=True)
    found: list[_Row] = []
    reason = uncapturable(problem.device)
    if reason is not None:
        found.append(replace(line, failure=reason))
    else:
        alone = _Checked(line, share.forward, share.both, share.inputs)
        found.append(_replayed(problem, alone, partial(ceiling_replays, problem, graphs)))
    for contestant, row in zip(contestants, rows, strict=True):
        if isinstance(contestant, Captured) and isinstance(row, _Checked) and row.entry is not None:
            row = _replayed(problem, row, partial(replays, problem, row.entry, graphs))
            if isinstance(row, Result):
                contestant.renew()
        found.append(row)
    return found


def _replayed(problem: Problem, row: _Checked, capture: Callable[[], Replays]) -> _Row:
    """The row with replays of its steps, or why it has none."""
    try:
        done = capture()
    except Uncaptured as raised:
        return replace(row.line, errors={}, error=None, failure=str(raised))
    row = replace(row, forward=done.forward, both=done.both, silent=done.silent, held=done.held)
    return _compared(problem, row, done.errors)


def _compared(problem: Problem, row: _Checked, errors: dict[str, float]) -> _Row:
    """The row with its errors, or that it is wrong."""
    line = replace(row.line, errors=errors, error=max(errors.values()))
    if all(error <= LIMITS[problem.tensors[0].dtype] for error in errors.values()):
        return replace(row, line=line)
    numbers = ", ".join(f"{key} {value:.2g}" for key, value in errors.items())
    what = "differs" if row.held is None else "its replay differs"
    return replace(line, failure=f"{what} from the kernel alone: {numbers}")


def _timed(problem: Problem, rows: Sequence[_Row], timer: Timer, slow: Slow | None) -> list[Result]:
    """A line for every row. All steps take turns."""
    timed = [row for row in rows if isinstance(row, _Checked)]
    steps = [row.both for row in timed]
    took = list(zip(timer.milliseconds([row.forward for row in timed]), timer.milliseconds(steps), strict=True))
    quiet = iter(timer.milliseconds([row.silent for row in timed if row.silent is not None]))
    slowed: list[float | None] = [None] * len(timed)
    if slow is not None:
        slowed = [*slow.costs(steps, [both for _, both in took], problem.share.both, timer)]
    alone = {row.line.contestant: one for row, one in zip(timed, took, strict=True) if row.entry is None}
    measured = iter(zip(took, slowed, strict=True))
    results = []
    for row in rows:
        if isinstance(row, Result):
            results.append(row)
            continue
        (forward, both), cost = next(measured)
        line = _result(problem, row, (forward, both), alone.get(CAPTURED_CEILING if row.line.captured else CEILING))
        exposed = None if row.silent is None else both - next(quiet)
        results.append(replace(line, exposed=exposed, slowed=cost, memory=_memory(problem, row)))
    return results


def _result(problem: Problem, row: _Checked, took: tuple[float, float], alone: tuple[float, float] | None) -> Result:
    forward, both = took
    shares = (None, None) if alone is None else (alone[0] / forward, alone[1] / both)
    entry = row.entry
    return replace(
        row.line,
        forward=forward,
        both=both,
        rate_forward=_rate(problem, 1.0, forward),
        rate_both=_rate(problem, 3.5, both),
        share_forward=shares[0],
        share_both=shares[1],
        choice=entry.choice if entry else "",
        planning=entry.planning_ms if entry else None,
    )


def _memory(problem: Problem, row: _Checked) -> float | None:
    """Peak of both passes over what they cannot do without: q, k, v, out and the gradient of each.

    Of a replay it is what the graph holds for as long as it lives. Of the kernel alone what is more than its inputs and
    results, the kernel itself takes.
    """
    needed = 2 * sum(x.nbytes for x in row.inputs)  # dq, dk and dv are as large as q, k and v, and out as dout
    peak = peak_bytes(row.both, problem.device) if row.held is None else row.held
    share = problem.share
    before = sum(x.nbytes for x in (share.out, *share.grads)) if row.entry is None else 0
    return (peak + needed // 2 + before) / needed if peak and needed else None


def _rate(problem: Problem, passes: float, milliseconds: float) -> float:
    """TFLOP/s per GPU."""
    return problem.flops(passes) / dist.get_world_size() / milliseconds * 1e-9
