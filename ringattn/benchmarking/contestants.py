"""Who computes it: this package on a mesh with a scheme, and plain Ulysses as other systems do it."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.attention import Settings, parallel_attention, prepare
from ringattn.benchmarking.problem import Problem
from ringattn.kernels.registry import choose
from ringattn.kernels.spec import Call, Grads, Options
from ringattn.parallel.executor import run
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh import MeshShape, SequenceMesh, init_mesh
from ringattn.parallel.plan import PartedPlan
from ringattn.parallel.planner import check_scheme, plan_attention, plan_parts


@dataclass
class Entry:
    """A contestant on one problem: steps to be timed. `both` returns local out, dq, dk, dv.

    `silent` is `both` without any transfer, if it can be had: what it is faster is communication that nothing hid.
    """

    layout: Layout
    forward: Callable[[], Any]
    both: Callable[[], list[Tensor]]
    silent: Callable[[], Any] | None
    planning_ms: float
    inputs: list[Tensor]
    choice: str = ""


class Contestant(Protocol):
    name: str

    def missing(self, problem: Problem) -> str | None:
        """Why it cannot do this problem, or None."""

    def enter(self, problem: Problem) -> Entry: ...


class Silent:
    """A transport that moves nothing."""

    def post(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> "Silent":
        return self

    def exchange(self, send: Tensor, receive: Tensor, send_sizes: list[int], receive_sizes: list[int]) -> "Silent":
        return self

    def wait(self) -> None: ...


@dataclass
class Ours:
    """`parallel_attention` with a scheme on a mesh of all ranks."""

    name: str
    mesh: SequenceMesh
    scheme: str

    def missing(self, problem: Problem) -> str | None:
        return None

    def enter(self, problem: Problem) -> Entry:
        mask = problem.workload.mask
        start = time.perf_counter()
        heads = problem.heads.query, problem.heads.key
        layout = Layout(problem.workload.docs, self.mesh, mask=mask, heads=heads, head_dim=problem.heads.dim)
        plans = plan_parts(layout, mask, problem.heads.query, problem.heads.key, self.scheme)
        planning = (time.perf_counter() - start) * 1e3
        leaves, dout = problem.inputs(layout)
        settings = Settings(mask=mask, backend=problem.backend, scheme=self.scheme)

        def attend() -> Tensor:
            return parallel_attention(*leaves, layout, mask=mask, backend=problem.backend, scheme=self.scheme)

        def forward() -> None:
            with torch.no_grad():
                attend()

        def both() -> list[Tensor]:
            out = attend()
            return [out, *torch.autograd.grad(out, leaves, dout)]

        def silent() -> None:
            jobs = [
                replace(job, ring=job.ring and Silent(), ulysses=job.ulysses and Silent())
                for job in prepare(*leaves, None, layout, settings)
            ]
            torch.autograd.grad(run(jobs, *leaves, None)[0], leaves, dout)

        return Entry(layout, forward, both, silent, planning, [*leaves, dout], _choice(plans, layout))


def _choice(plans: PartedPlan, layout: Layout) -> str:
    """Of each part degrees, and the schedules of the forward and, if another, of the backward pass."""
    out = []
    for part, (_, plan) in zip(layout.parts or (layout,), plans.parts, strict=True):
        names = dict.fromkeys(
            one.schedule if one.schedule != "ring" else f"ring of {len(one.stages)} stages"
            for one in (plan, plan.backward or plan)
        )
        documents = f"{len(part.docs)} on " if layout.parts else ""
        out.append(f"{documents}{part.mesh.ring} × {part.mesh.ulysses} {'/'.join(names)}")
    return ", ".join(out)


class PlainUlysses:
    """The exchange of verl and ALST (DeepSpeed) around one kernel call: whole heads, packing copies, no overlap."""

    name = "plain Ulysses"

    def __init__(self, mesh: SequenceMesh) -> None:
        self.mesh = mesh  # ring 1

    def missing(self, problem: Problem) -> str | None:
        ranks, heads = self.mesh.ulysses, problem.heads
        if heads.query % ranks or heads.key % ranks:
            return f"needs head counts that divide by {ranks}, got {heads.query} and {heads.key}"
        if problem.workload.docs.total % ranks:
            return f"needs tokens that divide by {ranks}, got {problem.workload.docs.total}"
        return None

    def enter(self, problem: Problem) -> Entry:
        layout = Layout(problem.workload.docs, self.mesh, policy="contiguous")
        leaves, dout = problem.inputs(layout)
        backend, options = choose(problem.spec, problem.backend), Options(problem.heads.dim**-0.5)
        whole = Layout(problem.workload.docs, MeshShape())
        calls = plan_attention(whole, problem.workload.mask, problem.heads.query, problem.heads.key).stages[0].calls
        group = self.mesh.ulysses_group

        def attend() -> Tensor:
            q, k, v = (_Exchange.apply(x, True, group) for x in leaves)
            return _Exchange.apply(_Kernel.apply(q, k, v, calls, backend, options), False, group)

        def forward() -> None:
            with torch.no_grad():
                attend()

        def both() -> list[Tensor]:
            out = attend()
            return [out, *torch.autograd.grad(out, leaves, dout)]

        return Entry(layout, forward, both, None, 0.0, [*leaves, dout])


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, to_heads: bool, group: dist.ProcessGroup) -> Tensor:
        ctx.to_heads, ctx.group = to_heads, group
        ranks = dist.get_world_size(group)
        rows, heads, dim = x.shape
        if to_heads:
            send = x.view(rows, ranks, heads // ranks, dim).transpose(0, 1).contiguous()
            received = torch.empty_like(send)
            dist.all_to_all_single(received, send, group=group)
            return received.view(ranks * rows, heads // ranks, dim)
        received = x.new_empty(ranks, rows // ranks, heads, dim)
        dist.all_to_all_single(received, x.contiguous(), group=group)
        return received.transpose(0, 1).reshape(rows // ranks, ranks * heads, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return _Exchange.apply(grads[0], not ctx.to_heads, ctx.group), None, None


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, calls: tuple[Call, ...], backend: Any, options: Any
    ) -> Tensor:
        out = torch.zeros_like(q)
        lses = [
            backend.forward(q[slice(*c.q)], k[slice(*c.k)], v[slice(*c.k)], c, options, out[slice(*c.q)]) for c in calls
        ]
        ctx.save_for_backward(q, k, v, out, *lses)
        ctx.rest = calls, backend, options
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v, out, *lses = ctx.saved_tensors
        calls, backend, options = ctx.rest
        dout = grads[0].contiguous()
        target = Grads(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
        for c, lse in zip(calls, lses, strict=True):
            rows, keys = slice(*c.q), slice(*c.k)
            part = Grads(target.dq[rows], target.dk[keys], target.dv[keys])
            backend.backward(dout[rows], q[rows], k[keys], v[keys], out[rows], lse, c, options, part)
        return (*target, None, None, None)


def contestants(names: Sequence[str] | None, peers: bool) -> list[Contestant]:
    """By name, or with None every scheme on every mesh of all ranks. Collective.

    A name is `<scheme>:<ring>x<ulysses>`, or `auto:<ranks>` for degrees that every layout chooses.

    Raises ValueError for a name that is none, or degrees that do not make up the world.
    """
    ranks = dist.get_world_size()
    free = init_mesh(data=1, sequence=ranks)
    meshes = {(mesh.ring, mesh.ulysses): mesh for mesh in free.alternatives if isinstance(mesh, SequenceMesh)}

    found: list[Contestant] = []
    for name in names or every_name(ranks):
        scheme, degrees = parse(name, ranks)
        found.append(Ours(name, free if degrees is None else meshes[degrees], scheme))
    if peers:
        found.append(PlainUlysses(meshes[1, ranks]))
    return found


def every_name(ranks: int) -> list[str]:
    """Names of all schemes on all meshes of `ranks` ranks."""
    inner = [u for u in range(2, ranks) if ranks % u == 0]
    if ranks == 1:
        return ["auto:1"]
    ring = [f"{scheme}:{ranks}x1" for scheme in ("auto", "gather", "ring")]
    return [f"auto:{ranks}", *ring, *(f"hybrid:{ranks // u}x{u}" for u in inner), f"ulysses:1x{ranks}"]


def parse(name: str, ranks: int) -> tuple[str, tuple[int, int] | None]:
    """Scheme of a name, and its ring and ulysses degree if it has them. Raises ValueError."""
    if name == f"auto:{ranks}":
        return "auto", None
    parts = re.fullmatch(r"(\w+):(\d+)x(\d+)", name)
    if parts is None:
        raise ValueError(
            f"a contestant is auto:{ranks}, or <scheme>:<ring>x<ulysses> as in gather:{ranks}x1, got {name!r}"
        )
    ring, ulysses = int(parts[2]), int(parts[3])
    if ring * ulysses != ranks:
        raise ValueError(f"the degrees of {name!r} must make up the {ranks} ranks, got {ring} × {ulysses}")
    check_scheme(parts[1], MeshShape(1, ring, ulysses))
    return parts[1], (ring, ulysses)
