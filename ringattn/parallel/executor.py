"""Running a plan: one autograd function for every scheme. It walks stages of transfers and kernel calls, nothing else.

Legend: t local tokens, n tokens of the ring position (n = t without an exchange), H and K query and key heads (after
the exchange: this rank's), D head dim, V value head dim. `q_tHD`, `lse_Hn`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ringattn.kernels.merge import apply_sinks_, merge_, sinks_grad
from ringattn.kernels.reference import accumulation_dtype
from ringattn.kernels.spec import Backend, Call, Grads, Options, Range
from ringattn.parallel.plan import AttentionPlan, Stage
from ringattn.parallel.rows import Accumulator, KeyCast, KeyReduce
from ringattn.parallel.transport import Transport
from ringattn.parallel.ulysses import to_heads, to_tokens


@dataclass(frozen=True)
class Job:
    """All that an attention needs beside its tensors."""

    plan: AttentionPlan
    options: Options
    backend: Backend
    ring: Transport | None
    ulysses: Transport | None
    query_heads: int
    key_heads: int
    return_lse: bool = False


def run(job: Job, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Attention of the local tokens: q (t, H, D), k (t, K, D), v (t, K, V) -> out (t, H, V), lse (H, t) or None.

    Collective over the sequence ranks. Both passes of two calls may be interleaved in any order that is the same on all
    ranks. The lse has no gradient.
    """
    out, lse = _Attention.apply(q, k, v, sinks, job)
    return out, lse if job.return_lse else None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, job: Job) -> tuple[Tensor, Tensor]:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        exchange = job.plan.exchange
        if exchange is not None and job.ulysses is not None:
            k, v = (to_heads(x, exchange, job.ulysses, keys=True) for x in (k, v))
            q = to_heads(q, exchange, job.ulysses, keys=False)
        out, lse, kept = _forward(job, q, k, v)
        if sinks is not None:
            sinks = _own_sinks(sinks, job.plan)
            apply_sinks_(out, lse, sinks)
        ctx.job = job
        ctx.save_for_backward(q, k, v, out, lse, sinks, *kept)
        local_out, local_lse = out, lse
        if exchange is not None and job.ulysses is not None:
            local_out = to_tokens(out, exchange, job.ulysses, job.query_heads, keys=False)
            if job.return_lse:
                rows = to_tokens(lse.T.unsqueeze(-1), exchange, job.ulysses, job.query_heads, keys=False)
                local_lse = rows.squeeze(-1).T
        ctx.mark_non_differentiable(local_lse)
        ctx.set_materialize_grads(False)
        return local_out, local_lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        job: Job = ctx.job
        q, k, v, out, lse, sinks, *kept = ctx.saved_tensors
        exchange = job.plan.exchange
        dout = grads[0]
        if dout is None:  # every rank has the same graph, so every rank comes here
            return None, None, None, None, None
        if exchange is not None and job.ulysses is not None:
            dout = to_heads(dout.contiguous(), exchange, job.ulysses, keys=False)
        dsinks = None
        if sinks is not None:
            dsinks = _all_sinks(sinks_grad(dout, out, lse, sinks), job)
        dq, dk, dv = _backward(job, dout.contiguous(), q, k, v, out, lse, kept)
        if exchange is not None and job.ulysses is not None:
            dq = to_tokens(dq, exchange, job.ulysses, job.query_heads, keys=False)
            dtype, wide = k.dtype, accumulation_dtype(k.dtype)
            dk, dv = (
                to_tokens(x.to(wide), exchange, job.ulysses, job.key_heads, keys=True).to(dtype) for x in (dk, dv)
            )
        return dq, dk, dv, dsinks, None


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


def _forward(job: Job, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Out (n, H, V), lse (H, n), and the cast keys and values if the plan keeps them."""
    plan = job.plan
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    for start, stop in plan.uncovered:
        out[start:stop] = 0
    lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=accumulation_dtype(q.dtype))
    acc = Accumulator(out, plan.shared_q)
    kept: list[Tensor] = []
    casts = plan.stages[1:]
    cast = KeyCast.post(casts[0], job.ring, k, v) if casts else None
    _run_calls(job, plan.stages[0], q, k, v, acc, lse)
    for number, stage in enumerate(casts):
        assert cast is not None
        keys, values = cast.wait()
        cast = KeyCast.post(casts[number + 1], job.ring, k, v) if number + 1 < len(casts) else None
        _run_calls(job, stage, q, keys, values, acc, lse)
        if plan.keep_keys:
            kept += [keys, values]
    acc.finish()
    return out, lse, kept


def _run_calls(job: Job, stage: Stage, q: Tensor, k: Tensor, v: Tensor, acc: Accumulator, lse: Tensor) -> None:
    """Run a stage's calls. Every call writes its rows of `out` in place; rows that are shared are then merged."""
    if not q.shape[1]:
        return
    for call in stage.calls:
        rows, keys = slice(*call.q), slice(*call.k)
        part_lse = job.backend.forward(q[rows], k[keys], v[keys], call, job.options, acc.rows[rows])
        a, b = acc.inside(call.q)
        if a < b:
            inner = slice(a - call.q[0], b - call.q[0])
            merge_(acc.wide_rows(a, b), lse[:, a:b], acc.rows[a:b], part_lse[:, inner])
        for start, stop in acc.outside(call.q):
            lse[:, start:stop] = part_lse[:, start - call.q[0] : stop - call.q[0]]


def _backward(
    job: Job, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kept: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v of this rank's rows. The local stage comes last, so that it hides the last reduce."""
    plan = job.plan
    dq = Accumulator(torch.empty_like(q), plan.shared_q)
    dk, dv = (Accumulator(torch.empty_like(x), plan.shared_k) for x in (k, v))
    for start, stop in plan.uncovered:
        dq.rows[start:stop] = 0
    for start, stop in plan.unread:
        dk.rows[start:stop] = 0
        dv.rows[start:stop] = 0
    forward = dout, q, out, lse
    casts = plan.stages[1:]
    cast = KeyCast.post(casts[0], job.ring, k, v) if casts and not kept else None
    reduce: KeyReduce | None = None
    for number, stage in enumerate(casts):
        if cast is not None:
            keys, values = cast.wait()
            more = number + 1 < len(casts)
            cast = KeyCast.post(casts[number + 1], job.ring, k, v) if more else None
        else:
            keys, values = kept[2 * number : 2 * number + 2]
        shared = (0, stage.rows) if stage.overlapping_keys else (0, 0)
        dkeys, dvalues = (Accumulator(torch.empty_like(x), shared) for x in (keys, values))
        for start, stop in stage.unread:
            dkeys.rows[start:stop] = 0
            dvalues.rows[start:stop] = 0
        _run_backward_calls(job, stage, forward, keys, values, dq, dkeys, dvalues)
        if reduce is not None:
            reduce.wait(dk, dv)  # two stages' gradients at most are alive
        reduce = KeyReduce.post(stage, job.ring, dkeys, dvalues, plan.wide_reduce)
    _run_backward_calls(job, plan.stages[0], forward, k, v, dq, dk, dv)
    if reduce is not None:
        reduce.wait(dk, dv)
    return dq.finish(), dk.finish(), dv.finish()


def _run_backward_calls(
    job: Job,
    stage: Stage,
    forward: tuple[Tensor, Tensor, Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    dq: Accumulator,
    dk: Accumulator,
    dv: Accumulator,
) -> None:
    """Run a stage's calls backward. Kernels write gradient rows in place; rows that are shared are then added up."""
    dout, q, out, lse = forward
    if not q.shape[1]:
        for grad in (dk, dv):
            grad.rows.zero_()
        return
    for call in stage.calls:
        rows, keys = slice(*call.q), slice(*call.k)
        target = Grads(dq.rows[rows], *(_key_rows(grad, call) for grad in (dk, dv)))
        tensors = dout[rows], q[rows], k[keys], v[keys], out[rows], lse[:, rows]
        job.backend.backward(*tensors, call, job.options, target)
        dq.collect(call.q)
        for grad, written in ((dk, target.dk), (dv, target.dv)):
            for run in call.key_runs:
                if not call.dense_keys:
                    grad.rows[slice(*run)] = written[_shifted(run, call.k[0])]
                grad.collect(run)


def _key_rows(grad: Accumulator, call: Call) -> Tensor:
    """Where a kernel writes the gradient of a call's keys: in place, unless it would also write rows between them."""
    rows = grad.rows[slice(*call.k)]
    return rows if call.dense_keys else torch.empty_like(rows)


def _shifted(span: Range, base: int) -> slice:
    return slice(span[0] - base, span[1] - base)
