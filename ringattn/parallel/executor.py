"""Running a plan: one autograd function for every scheme, and the exchange of heads around the stages.

Legend: t local tokens, n tokens of the ring position (n = t without an exchange), H and K query and key heads (after
the exchange: this rank's), D head dim, V value head dim. `q_tHD`, `lse_Hn`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringattn.kernels.merge import apply_sinks_, sinks_grad
from ringattn.parallel.plan import AttentionPlan, Exchange
from ringattn.parallel.stages import Job, Saved, Steps, T, backward_stages, forward_stages
from ringattn.parallel.transport import Transport
from ringattn.parallel.ulysses import Columns, joined, to_heads, to_tokens


def together(passes: Sequence[Steps[T]]) -> list[T]:
    """The results of several passes that take turns at their transfers."""
    results: dict[int, T] = {}
    while len(results) < len(passes):
        for number, steps in enumerate(passes):
            if number not in results:
                try:
                    next(steps)
                except StopIteration as stop:
                    results[number] = stop.value
    return [results[number] for number in range(len(passes))]


def run(job: Job, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention of the local tokens: q (t, H, D), k (t, K, D), v (t, K, V) -> out (t, H, V), lse (H, t).

    Collective over the sequence ranks, and so is its backward pass: the loss of every rank must depend on its `out`,
    and several calls may be in flight as long as all ranks go through them in the same order. The lse has no gradient,
    and is of this rank's tokens only if the job asks for it.
    """
    return _Attention.apply(q, k, v, sinks, job)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """The reference backend's sums are matrix products too, and must stay as wide as they are."""
    if not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, job: Job) -> tuple[Tensor, Tensor]:
        keep = job.plan.keep_keys and any(ctx.needs_input_grad[:3])
        with without_autocast(q):
            ((out, lse, saved, kept),) = together([forward_pass(job, q, k, v, sinks, keep)])
        ctx.job = job
        ctx.save_for_backward(*saved, sinks, *kept)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:  # out was not used; see `run`
            return None, None, None, None, None
        q, k, v, out, lse, sinks, *kept = ctx.saved_tensors
        with without_autocast(out):
            (found,) = together([backward_pass(ctx.job, grads[0], Saved(q, k, v, out, lse), sinks, kept)])
        return *found, None


def forward_pass(
    job: Job, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, keep: bool
) -> Steps[tuple[Tensor, Tensor, Saved, list[Tensor]]]:
    """Local out (t, H, V) and lse (H, t), what the backward pass needs, and the cast keys if they are to be kept."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    exchange, ulysses = job.plan.exchange, job.ulysses
    if exchange is not None and ulysses is not None:
        arriving = to_heads([q], [k, v], exchange, ulysses)
        yield
        q, k, v = arriving.wait()
    out, lse, kept = yield from forward_stages(job, q, k, v, keep)
    if sinks is not None:
        apply_sinks_(out, lse, _own_sinks(sinks, job.plan))
    saved = Saved(q, k, v, out, lse)
    if exchange is None or ulysses is None:
        return out, lse, saved, kept
    tokens, heads, local_lse = exchange.own_rows, job.query_heads, lse
    returning = to_tokens(out.flatten(1), [Columns("query", out.shape[2])], exchange, ulysses)
    with_lse = to_tokens(lse.T, [Columns("query", 1)], exchange, ulysses) if job.return_lse else None
    yield
    local_out = out.new_empty(tokens, heads, out.shape[2])
    returning.wait([local_out])
    if with_lse is not None:
        rows = lse.new_empty(tokens, heads, 1)
        with_lse.wait([rows])
        local_lse = rows.squeeze(-1).T
    return local_out, local_lse, saved, kept


def backward_pass(
    job: Job, dout: Tensor, saved: Saved, sinks: Tensor | None, kept: list[Tensor]
) -> Steps[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """dq (t, H, D), dk (t, K, D), dv (t, K, V) of the local tokens and the gradient of the sinks (H,)."""
    dout = dout.contiguous()
    exchange, ulysses = job.plan.exchange, job.ulysses
    if exchange is None or ulysses is None:
        dsinks = None if sinks is None else sinks_grad(dout, saved.out, saved.lse, sinks)
        found = yield from backward_stages(job.backward, dout, saved, kept, [torch.empty_like(x) for x in saved[:3]])
        dq, dk, dv = (grad.finish() for grad in found)
        return dq, dk, dv, dsinks
    arriving = to_heads([dout], [], exchange, ulysses)
    yield
    (dout,) = arriving.wait()
    dsinks = None
    if sinks is not None:
        dsinks = _all_sinks(sinks_grad(dout, saved.out, saved.lse, _own_sinks(sinks, job.plan)), job)
    dq, dk, dv = yield from _exchanged_backward(job, exchange, ulysses, dout, saved, kept)
    return dq, dk, dv, dsinks


def _exchanged_backward(
    job: Job, exchange: Exchange, ulysses: Transport, dout: Tensor, saved: Saved, kept: list[Tensor]
) -> Steps[list[Tensor]]:
    """Gradients of this rank's heads, (n, H, V) of out given, brought back to its tokens."""
    head_dim, value_dim = saved.k.shape[2], saved.v.shape[2]
    queries, keys = [Columns("query", head_dim)], [Columns("key", head_dim), Columns("key", value_dim)]
    shapes = (job.query_heads, head_dim), (job.key_heads, head_dim), (job.key_heads, value_dim)
    grads = [dout.new_empty(exchange.own_rows, *shape) for shape in shapes]
    if job.plan.sums_copies:
        message, rows = joined(queries, dout, exchange, ulysses)
        rows += [torch.empty_like(x) for x in saved[1:3]]
        dq, dk, dv = yield from backward_stages(job.backward, dout, saved, kept, rows)
        dq.finish()
        wide = torch.cat([dk.sums(True).flatten(1), dv.sums(True).flatten(1)], 1)
        returning = [to_tokens(message, queries, exchange, ulysses), to_tokens(wide, keys, exchange, ulysses)]
        targets = [grads[:1], grads[1:]]
    else:
        message, rows = joined(queries + keys, dout, exchange, ulysses)
        found = yield from backward_stages(job.backward, dout, saved, kept, rows)
        for grad in found:
            grad.finish()
        returning, targets = [to_tokens(message, queries + keys, exchange, ulysses)], [grads]
    yield
    for one, some in zip(returning, targets, strict=True):
        one.wait(some)
    return grads


def _own_sinks(sinks: Tensor, plan: AttentionPlan) -> Tensor:
    if plan.exchange is None:
        return sinks
    return sinks[slice(*plan.exchange.heads[plan.exchange.rank].query)]


def _all_sinks(grad: Tensor, job: Job) -> Tensor:
    """Gradient of all heads' sinks, 0 for the heads of other ranks: like a weight's, it is summed over the ranks."""
    if job.plan.exchange is None:
        return grad
    full = grad.new_zeros(job.query_heads)
    full[slice(*job.plan.exchange.heads[job.plan.exchange.rank].query)] = grad
    return full
