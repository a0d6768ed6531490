"""Who computes it: what a contestant is, and this package on a mesh with a scheme."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor

from ringattn.attention import parallel_attention
from ringattn.benchmarking.problem import Placed, Problem
from ringattn.parallel.execution.executor import run
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.parallel.plan.plan import PartedPlan
from ringattn.parallel.plan.route import Route
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.planner import plan_parts
from ringattn.preparation import prepare
from ringattn.settings import AttentionOptions

FILLING = 4  # calls that are filled with random numbers: the first, which are not timed


@dataclass
class Entry:
    """A contestant on one problem: steps to be timed. Their inputs stay where they are from call to call.

    `forward` returns local out, and `both` local out, dq, dk, dv, (t, heads, D) each.
    `silent` is `both` without any transfer, if it can be had: what it is faster is communication that nothing hid.
    `arrived`: where it wrote nothing while it was captured, though something would have arrived there.
    `close` undoes what entering changed in the process.
    """

    layout: Placed
    forward: Callable[[], Tensor]
    both: Callable[[], list[Tensor]]
    inputs: list[Tensor]
    silent: Callable[[], Any] | None = None
    arrived: list[Tensor] = field(default_factory=list)
    planning_ms: float | None = None
    choice: str = ""
    close: Callable[[], None] = lambda: None


def told(error: Exception) -> str:
    """The start of an error, fit for a cell of a table."""
    line = " ".join(str(error).split()).replace("|", "/")
    return f"{type(error).__name__}: {line[:200]}"


def segmented(problem: Problem) -> str | None:
    """Why a system that knows bands of documents alone cannot do the problem, or None."""
    return "has no trees and no blocks of tokens that see each other" if problem.workload.docs.segmented else None


class Contestant(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def peer(self) -> bool:
        """Another system: that it fails is a line of the report, and not the end of it."""

    def missing(self, problem: Problem) -> str | None:
        """Why it cannot do this problem, or None: the same on every rank."""

    def enter(self, problem: Problem) -> Entry: ...


def entry_of(
    layout: Placed, attend: Callable[[], Tensor], leaves: Sequence[Tensor], dout: Tensor, choice: str = ""
) -> Entry:
    """The steps of an attention of `leaves`, q, k and v, whose gradient is `dout`."""

    def forward() -> Tensor:
        with torch.no_grad():
            return attend()

    def both() -> list[Tensor]:
        out = attend()
        return [out, *torch.autograd.grad(out, leaves, dout)]

    return Entry(layout, forward, both, [*leaves, dout], choice=choice)


class Silent:
    """A transport that moves nothing. While it is `filling`, what arrives is random: of zeros kernels are faster, and
    later calls find in their memory what was there before.

    A captured step finds in its own memory what nobody wrote there, so all of it is kept in `arrived` to be filled."""

    name, reason = "silent", ""

    def __init__(self, filling: bool, arrived: list[Tensor]) -> None:
        self.filling = filling
        self.arrived = arrived

    def buffer(self, route: Route, like: Tensor) -> Tensor:
        return like.new_empty(route.sent)

    def message(self, x: Tensor, route: Route) -> Tensor:
        return x

    def exchange(self, send: Tensor, receive: Tensor, route: Route) -> "Silent":
        if self.filling:
            receive.normal_()
        elif receive.is_cuda and torch.cuda.is_current_stream_capturing():
            self.arrived.append(receive)
        return self

    def wait(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class Ours:
    """`parallel_attention` on a mesh of all ranks, with options of which each problem sets mask and backend."""

    name: str
    mesh: SequenceMesh
    options: AttentionOptions = AttentionOptions()
    peer = False

    def missing(self, problem: Problem) -> str | None:
        return None

    def enter(self, problem: Problem) -> Entry:
        mask = problem.workload.mask
        start = time.perf_counter()
        heads = problem.heads.query, problem.heads.key
        layout = Layout(problem.workload.docs, self.mesh, mask=mask, heads=heads, head_dim=problem.heads.dim)
        options = self.options._replace(mask=mask, backend=problem.backend)
        shape = Shape(*heads, problem.heads.dim, problem.heads.dim, problem.tensors[0].dtype.itemsize)
        plans = plan_parts(layout, shape, options)
        planning = (time.perf_counter() - start) * 1e3
        leaves, dout = problem.inputs(layout)
        calls, arrived = count(), list[Tensor]()

        def attend() -> Tensor:
            return parallel_attention(*leaves, layout, **options._asdict())

        def silent() -> None:
            nothing = Silent(next(calls) < FILLING, arrived)
            jobs = [
                replace(job, ring=job.ring and nothing, ulysses=job.ulysses and nothing)
                for job in prepare(*leaves, None, layout, options)
            ]
            torch.autograd.grad(run(jobs, *leaves, None)[0], leaves, dout)

        entry = entry_of(layout, attend, leaves, dout, _choice(plans, layout))
        return replace(entry, silent=silent, arrived=arrived, planning_ms=planning)


def _choice(plans: PartedPlan, layout: Layout) -> str:
    """Of each part degrees, and the schedules of the forward and, if another, of the backward pass."""
    out = []
    for part, (_, plan) in zip(layout.parts, plans.parts, strict=True):
        names = dict.fromkeys(walked.schedule_name for walked in plan.passes)
        documents = f"{len(part.docs)} on " if len(layout.parts) > 1 else ""
        groups = f", {plan.exchange.groups} head groups" if plan.exchange and plan.exchange.groups > 1 else ""
        out.append(f"{documents}{part.mesh.ring} × {part.mesh.ulysses} {'/'.join(names)}{groups}")
    return ", ".join(out)
