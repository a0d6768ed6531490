"""FlexAttention with a block mask of the documents, behind the exchange of plain Ulysses: what others compute trees and
blocks with.

It is torch's public function with a mask of its own, token by token, and shares nothing with this package's backend of
that name: a second judge of what the planners made of a mask.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.benchmarking.contestants import Entry, entry_of
from ringattn.benchmarking.plain_ulysses import Exchange, undivided
from ringattn.benchmarking.problem import Problem
from ringattn.documents import Documents
from ringattn.kernels.backends.flex import eager_attention, within_reach
from ringattn.kernels.backends.rows import as_batch, from_batch
from ringattn.mask import Mask
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh.shape import MeshShape

MOST_EAGER = 4096  # tokens: without a kernel all scores are held


class FlexPeer:
    name = "flex"
    peer = True

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def missing(self, problem: Problem) -> str | None:
        total = problem.workload.docs.total
        if problem.device.type != "cuda" and total > MOST_EAGER:
            return f"holds all scores on the CPU: takes {MOST_EAGER} tokens there, got {total}"
        return undivided(problem, dist.get_world_size(self.group))

    def enter(self, problem: Problem) -> Entry:
        docs, group = problem.workload.docs, self.group
        layout = Layout(docs, MeshShape(1, 1, dist.get_world_size(group), dist.get_rank(group)), policy="contiguous")
        leaves, dout = problem.inputs(layout)
        kernel = flex_kernel(docs, problem.workload.mask, problem.heads.dim**-0.5, problem.device)

        def attend() -> Tensor:
            q, k, v = (Exchange.apply(x, True, group) for x in leaves)
            return Exchange.apply(kernel(q, k, v), False, group)

        return entry_of(layout, attend, leaves, dout, "its own kernel, Triton")


def flex_kernel(
    docs: Documents, mask: Mask, scale: float, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention of the whole stream: q (T, H, D), k (T, K, D), v (T, K, V) -> (T, H, V), differentiable.

    On the CPU by torch's plain form of the operator, as the public function has no gradients there.
    """
    compiled = device.type == "cuda"
    block_mask = _compiled().mask if compiled else _plain().mask
    made = block_mask(visible(docs, mask, device), None, None, docs.total, docs.total, device=str(device))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = map(within_reach, as_batch(q, k, v))
        if not compiled:
            return from_batch(eager_attention(scale, 0.0, 0.0)(made, q, k, v)[0])
        out: Any = _compiled().attend(q, k, v, block_mask=made, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return from_batch(out).contiguous()

    return attend


class _Functions(NamedTuple):
    attend: Callable[..., Any]
    mask: Callable[..., Any]


def _plain() -> _Functions:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return _Functions(flex_attention, create_block_mask)


@cache
def _compiled() -> _Functions:
    """As its documentation has it: lengths are constants of the kernel, and a mask is made without all of its pairs."""
    return _Functions(*(torch.compile(function) for function in _plain()))


def visible(docs: Documents, mask: Mask, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether a query sees a key, both by their places in the stream: a `mask_mod`, by definition and without geometry.

    Raises ValueError for masks with chunks.
    """
    if mask.chunk is not None:
        raise ValueError(f"mask must have no chunk for FlexAttention here, got {mask}")
    enter, leave, position, block = (x.to(device) for x in _by_token(docs))
    lo, hi = mask.band.lo, mask.band.hi

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        on_path = (enter[key] <= enter[query]) & (enter[query] <= leave[key])
        distance = position[key] - position[query]
        before = on_path if hi is None else on_path & (distance <= hi)
        together = (block[query] >= 0) & (block[query] == block[key])
        if mask.blocks == "clipped":
            before = before | together
        inside = before if lo is None else before & (distance >= lo)
        return inside | together if mask.blocks == "whole" else inside

    return allowed


def _by_token(docs: Documents) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each token, int32 (T,): when a walk of all trees enters its segment, and when it enters the last one that
    follows on it; its position; the number of its block, or -1. Padding is on no path."""
    enter, leave, block = (torch.full((docs.total,), value, dtype=torch.int32, device="cpu") for value in (-1, -2, -1))
    runs = [(segment.start, segment.stop, segment.parent) for segment in docs.segments]
    trees = {start for start, _, parent in runs if parent < 0}
    runs += [(a, a + n, -1) for a, n in zip(docs.starts, docs.lengths, strict=True) if n and a not in trees]
    children: list[list[int]] = [[] for _ in runs]
    for number, (_, _, parent) in enumerate(runs):
        if parent >= 0:
            children[parent].append(number)
    entered, left, clock = [0] * len(runs), [0] * len(runs), 0
    stack = [(number, False) for number, (_, _, parent) in enumerate(runs) if parent < 0]
    while stack:
        number, done = stack.pop()
        if done:
            left[number] = clock - 1
            continue
        entered[number], clock = clock, clock + 1
        stack += [(number, True), *((child, False) for child in children[number])]
    for (start, stop, _), first, last in zip(runs, entered, left, strict=True):
        enter[start:stop], leave[start:stop] = first, last
    for number, (start, stop) in enumerate(docs.blocks):
        block[start:stop] = number
    return enter, leave, docs.position_ids().int(), block
