"""Plain Ulysses: the exchange of verl and ALST (DeepSpeed) around one kernel call."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.benchmarking.contestants import Entry, entry_of, segmented
from ringattn.benchmarking.problem import Problem
from ringattn.kernels.registry import choose
from ringattn.kernels.spec import Call, Grads, Options, SavedCall
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh.shape import MeshShape
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.planner import plan_attention
from ringattn.settings import AttentionOptions


def undivided(problem: Problem, ranks: int) -> str | None:
    """Why heads and tokens cannot be exchanged in equal parts, or None."""
    heads, total = problem.heads, problem.workload.docs.total
    if heads.query % ranks or heads.key % ranks:
        return f"needs head counts that divide by {ranks}, got {heads.query} and {heads.key}"
    return f"needs tokens that divide by {ranks}, got {total}" if total % ranks else None


class PlainUlysses:
    """Whole heads, packing copies, no overlap."""

    name = "plain-ulysses"
    peer = True

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def missing(self, problem: Problem) -> str | None:
        return undivided(problem, dist.get_world_size(self.group)) or segmented(problem)

    def enter(self, problem: Problem) -> Entry:
        docs, group = problem.workload.docs, self.group
        layout = Layout(docs, MeshShape(1, 1, dist.get_world_size(group), dist.get_rank(group)), policy="contiguous")
        leaves, dout = problem.inputs(layout)
        backend, options = choose(problem.spec, problem.backend), Options(problem.heads.dim**-0.5)
        whole = Layout(docs, MeshShape())
        shape = Shape(problem.heads.query, problem.heads.key, problem.heads.dim, problem.heads.dim)
        calls = plan_attention(whole, shape, AttentionOptions(problem.workload.mask)).stages[0].calls

        def attend() -> Tensor:
            q, k, v = (Exchange.apply(x, True, group) for x in leaves)
            return Exchange.apply(_Kernel.apply(q, k, v, calls, backend, options), False, group)

        return entry_of(layout, attend, leaves, dout)


class Exchange(torch.autograd.Function):
    """Tokens for heads, (t, H, D) -> (T, h, D), or back. Collective."""

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
        return Exchange.apply(grads[0], not ctx.to_heads, ctx.group), None, None


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
            saved = SavedCall(q[rows], k[keys], v[keys], out[rows], lse, c, options)
            backend.backward(dout[rows], saved, part)
        return (*target, None, None, None)
