"""One workload's tensors on every rank, the kernel alone on an even share of the heads, and what is right.

Legend: T tokens of the stream, t of this rank, H query heads, K key heads, D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.attention import parallel_attention
from ringattn.benchmarking.workloads import Workload
from ringattn.kernels.registry import choose
from ringattn.kernels.spec import CallSpec, Grads, Options, SavedCall
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh.shape import MeshShape
from ringattn.parallel.plan.exchange import exchange_plan
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.planner import plan_attention
from ringattn.settings import AttentionOptions

NAMES = "out", "dq", "dk", "dv"
SAMPLES = 2048  # rows whose results are compared
# Relative to the kernel alone, which rounds as much itself.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Heads:
    query: int
    key: int
    dim: int


def spec_of(workload: Workload, heads: Heads, device: torch.device, dtype: torch.dtype) -> CallSpec:
    """What a kernel is asked for; of a block also its upper triangle, which is a window."""
    window = workload.mask.window != (-1, -1) or bool(workload.docs.blocks)
    return CallSpec(device.type, dtype, heads.dim, heads.dim, heads.query, heads.key, window=window)


class Placed(Protocol):
    """Which tokens this rank holds: a `Layout`, or another system's own placement."""

    def shard(self, x: Tensor) -> Tensor:
        """This rank's rows of a tensor of the stream, (T, ...) -> (t, ...)."""

    def indices(self) -> Tensor:
        """Their places in the stream, (t,) int64 on the host."""

    def tokens(self) -> int: ...


@dataclass(frozen=True)
class Problem:
    """q, k, v and dout of the whole stream, (T, heads, D), the same random numbers on every rank."""

    workload: Workload
    heads: Heads
    backend: str
    tensors: tuple[Tensor, Tensor, Tensor, Tensor]

    @classmethod
    def draw(
        cls, workload: Workload, heads: Heads, backend: str, device: torch.device, dtype: torch.dtype, seed: int
    ) -> "Problem":
        generator = torch.Generator(device).manual_seed(seed)
        counts = (heads.query, heads.key, heads.key, heads.query)
        q, k, v, dout = (
            torch.randn(workload.docs.total, count, heads.dim, generator=generator, device=device, dtype=dtype)
            for count in counts
        )
        return cls(workload, heads, backend, (q, k, v, dout))

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def spec(self) -> CallSpec:
        return spec_of(self.workload, self.heads, self.device, self.tensors[0].dtype)

    def flops(self, passes: float) -> float:
        """Of all ranks, by mask area; passes: 1 forward, 3.5 forward and backward."""
        return 4.0 * self.workload.pairs() * self.heads.query * self.heads.dim * passes

    def inputs(self, layout: Placed) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """This rank's q, k, v as leaves, and dout."""
        q, k, v, dout = (layout.shard(x).contiguous() for x in self.tensors)
        return (q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), dout

    @cached_property
    def share(self) -> "Share":
        return Share.of(self)

    @cached_property
    def samples(self) -> Tensor:
        """Rows of the stream that are compared: the same on every rank."""
        total = self.workload.docs.total
        rows = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:SAMPLES]
        return rows.sort().values.to(self.device)

    @cached_property
    def expected(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """out, dq, dk, dv of the sampled rows, (samples, heads, D) float32, from all ranks' shares. Collective."""
        self.share.both()
        whole = []
        for part, heads, index in (
            (self.share.out, self.heads.query, self.share.query_index),
            (self.share.grads.dq, self.heads.query, self.share.query_index),
            (self.share.grads.dk, self.heads.key, self.share.key_index),
            (self.share.grads.dv, self.heads.key, self.share.key_index),
        ):
            rows = part.new_zeros(len(self.samples), heads, self.heads.dim, dtype=torch.float32)
            rows.index_add_(1, index, part[self.samples].float())
            dist.all_reduce(rows)
            whole.append(rows)
        return whole[0], whole[1], whole[2], whole[3]

    def errors(self, layout: Placed, results: list[Tensor]) -> dict[str, float]:
        """Relative differences of this layout's local results to `expected`, over all ranks. Collective.

        Arguments:
            results: out, or out, dq, dk and dv, (t, heads, D) each.
        """
        assert len(results) in (1, len(NAMES)), len(results)
        place = torch.full((self.workload.docs.total,), -1, dtype=torch.int64)
        place[layout.indices()] = torch.arange(layout.tokens())
        local = place.to(self.device)[self.samples]
        mine = local >= 0
        errors = {}
        for name, result, expected in zip(NAMES, results, self.expected, strict=False):
            difference = (result.detach()[local[mine]].float() - expected[mine]).norm() ** 2
            sums = torch.stack([difference, expected[mine].norm() ** 2]).double()
            dist.all_reduce(sums)
            errors[name] = float((sums[0] / sums[1]).sqrt())
        return errors


@dataclass
class Share:
    """The kernel alone: all tokens with an even share of the heads, no communication. The ceiling of every scheme.

    Of trees and blocks, whose queries are in several calls, these, what merges them, and copies of the results.
    """

    forward: Callable[[], Any]
    both: Callable[[], Any]
    inputs: list[Tensor]  # q, k, v, dout
    out: Tensor
    grads: Grads
    query_index: Tensor
    key_index: Tensor

    @classmethod
    def of(cls, problem: Problem) -> "Share":
        rank, ranks = dist.get_rank(), dist.get_world_size()
        total = problem.workload.docs.total
        heads = exchange_plan(((0, total),) * ranks, problem.heads.query, problem.heads.key, rank).heads[rank]
        device = problem.device
        query_index = torch.arange(*heads.query, device=device)
        key_index = torch.tensor(heads.keys, dtype=torch.int64, device=device)
        q, dout = (problem.tensors[i][:, slice(*heads.query)].contiguous() for i in (0, 3))
        k, v = (problem.tensors[i].index_select(1, key_index) for i in (1, 2))
        out, grads = torch.zeros_like(q), Grads(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
        make = _merged_steps if problem.workload.docs.segmented else _kernel_steps
        forward, both = make(problem, [q, k, v, dout], out, grads)
        return cls(forward, both, [q, k, v, dout], out, grads, query_index, key_index)


Steps = tuple[Callable[[], Any], Callable[[], None]]  # forward, and forward and backward


def _kernel_steps(problem: Problem, tensors: list[Tensor], out: Tensor, grads: Grads) -> Steps:
    """The calls of one process."""
    q, k, v, dout = tensors
    shape = Shape(q.shape[1], k.shape[1], problem.heads.dim, problem.heads.dim)
    whole = Layout(problem.workload.docs, MeshShape())
    calls = plan_attention(whole, shape, AttentionOptions(problem.workload.mask)).stages[0].calls
    backend, options = choose(problem.spec, problem.backend), Options(problem.heads.dim**-0.5)

    def forward() -> list[Tensor]:
        return [
            backend.forward(q[slice(*c.q)], k[slice(*c.k)], v[slice(*c.k)], c, options, out[slice(*c.q)]) for c in calls
        ]

    def both() -> None:
        for c, lse in zip(calls, forward(), strict=True):
            rows, keys = slice(*c.q), slice(*c.k)
            target = Grads(grads.dq[rows], grads.dk[keys], grads.dv[keys])
            saved = SavedCall(q[rows], k[keys], v[keys], out[rows], lse, c, options)
            backend.backward(dout[rows], saved, target)

    return forward, both


def _merged_steps(problem: Problem, tensors: list[Tensor], out: Tensor, grads: Grads) -> Steps:
    """The attention of one process, whose calls share queries and keys."""
    q, k, v = (x.requires_grad_() for x in tensors[:3])
    whole = Layout(problem.workload.docs, MeshShape(), "contiguous")  # in the order of the stream

    def attend() -> Tensor:
        return parallel_attention(q, k, v, whole, mask=problem.workload.mask, backend=problem.backend)

    def forward() -> None:
        with torch.no_grad():
            out.copy_(attend())

    def both() -> None:
        result = attend()
        found = torch.autograd.grad(result, (q, k, v), tensors[3])
        for target, x in zip((out, *grads), (result.detach(), *found), strict=True):
            target.copy_(x)

    return forward, both
