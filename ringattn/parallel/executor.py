"""Running a plan: one autograd function for every scheme. It walks stages of transfers and kernel calls, nothing else.

Legend: t local tokens, n tokens of the ring position (n = t without an exchange), H and K query and key heads (after
the exchange: this rank's), D head dim, V value head dim. `q_tHD`, `lse_Hn`.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringattn.kernels.merge import apply_sinks_, merge_, sinks_grad
from ringattn.kernels.spec import Backend, Call, Dropout, Grads, Options, Range, accumulation_dtype, to_device
from ringattn.parallel.plan import AttentionPlan, Stage
from ringattn.parallel.rows import Accumulator, KeyCast, KeyReduce
from ringattn.parallel.transport import Transport
from ringattn.parallel.ulysses import all_keys, all_queries, joined, to_heads, to_tokens


@dataclass(frozen=True)
class Job:
    """All that an attention needs beside its tensors, or one of its parts."""

    plan: AttentionPlan
    rows: Range = field(kw_only=True)  # of the rank's tensors
    options: Options
    dropout: tuple[float, int] | None  # probability and seed
    backend: Backend
    adds: bool  # the backend adds gradients to sums by itself
    ring: Transport | None
    ulysses: Transport | None
    device: torch.device
    query_heads: int
    key_heads: int
    return_lse: bool = False

    @property
    def backward(self) -> "Job":
        """The same with the plan that the backward pass walks."""
        return self if self.plan.backward is None else replace(self, plan=self.plan.backward)


def run(jobs: Sequence[Job], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention of the local tokens: q (t, H, D), k (t, K, D), v (t, K, V) -> out (t, H, V), lse (H, t).

    Arguments:
        jobs: of the parts, whose rows are those of the tensors one after another.

    Collective over the sequence ranks, and so is its backward pass: the loss of every rank must depend on its `out`,
    and several calls may be in flight as long as all ranks go through them in the same order. The lse has no gradient,
    and is of this rank's tokens only if the jobs ask for it.
    """
    return _Attention.apply(q, k, v, sinks, jobs)


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """The reference backend's sums are matrix products too, and must stay as wide as they are."""
    if not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, jobs: Sequence[Job]
    ) -> tuple[Tensor, Tensor]:
        keep = any(ctx.needs_input_grad[:3])
        done = [forward_part(job, q, k, v, sinks, keep and job.plan.keep_keys) for job in jobs]
        ctx.jobs, ctx.kept = jobs, [len(kept) for *_, kept in done]
        ctx.save_for_backward(sinks, *(x for *_, saved, kept in done for x in (*saved, *kept)))
        out, lse = joined_parts([out for out, *_ in done]), joined_lse(jobs, [lse for _, lse, *_ in done])
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dout = grads[0]
        if dout is None:  # out was not used; see `run`
            return None, None, None, None, None
        sinks, *tensors = ctx.saved_tensors
        done = []
        for job, kept in zip(ctx.jobs, ctx.kept, strict=True):
            saved, tensors = Saved(*tensors[:5]), tensors[5:]
            done.append(backward_pass(job, part_rows(dout, job), saved, sinks, tensors[:kept]))
            tensors = tensors[kept:]
        return *joined_grads(done), None


def part_rows(x: Tensor, job: Job) -> Tensor:
    """A part's rows of the rank's tensor, as a view."""
    return x if job.rows == (0, len(x)) else x[slice(*job.rows)]


def forward_part(
    job: Job, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, "Saved", list[Tensor]]:
    """`forward_pass` of a part's rows of the rank's tensors."""
    return forward_pass(job, part_rows(q, job), part_rows(k, job), part_rows(v, job), sinks, keep)


def joined_parts(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The rank's tensor of its parts' ones."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def joined_lse(jobs: Sequence[Job], parts: Sequence[Tensor]) -> Tensor:
    """(H, t), but what any part has if the jobs do not ask for it."""
    return joined_parts(parts, 1) if jobs[0].return_lse else parts[0]


def joined_grads(
    done: Sequence[tuple[Tensor, Tensor, Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and the sinks from those of the parts, which have the same sinks."""
    dq, dk, dv, dsinks = zip(*done, strict=True)
    total = None if dsinks[0] is None else sum(dsinks[1:], dsinks[0])
    return joined_parts(dq), joined_parts(dk), joined_parts(dv), total


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass; after the exchange, if there is one."""

    q: Tensor  # (n, H, D)
    k: Tensor  # (n, K, D)
    v: Tensor  # (n, K, V)
    out: Tensor  # (n, H, V)
    lse: Tensor  # (H, n)


def forward_pass(
    job: Job, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Saved, list[Tensor]]:
    """Local out (t, H, V) and lse (H, t), what the backward pass needs, and the cast keys if they are to be kept."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    exchange = job.plan.exchange
    if exchange is not None and job.ulysses is not None:
        q, k, v = to_heads([q], [k, v], exchange, job.ulysses)
    with _without_autocast(q):
        out, lse, kept = _forward(job, q, k, v, keep)
    if sinks is not None:
        apply_sinks_(out, lse, _own_sinks(sinks, job.plan))
    local_out, local_lse = out, lse
    if exchange is not None and job.ulysses is not None:
        (parts,) = to_tokens(out.flatten(1), [("query", out.shape[2])], exchange, job.ulysses)
        local_out = all_queries(parts)
        if job.return_lse:
            (parts,) = to_tokens(lse.T, [("query", 1)], exchange, job.ulysses)
            local_lse = all_queries(parts).squeeze(-1).T
    return local_out, local_lse, Saved(q, k, v, out, lse), kept


def backward_pass(
    job: Job, dout: Tensor, saved: Saved, sinks: Tensor | None, kept: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq (t, H, D), dk (t, K, D), dv (t, K, V) of the local tokens and the gradient of the sinks (H,)."""
    dout = dout.contiguous()
    exchange = job.plan.exchange
    if exchange is not None and job.ulysses is not None:
        (dout,) = to_heads([dout], [], exchange, job.ulysses)
    dsinks = None
    if sinks is not None:
        dsinks = _all_sinks(sinks_grad(dout, saved.out, saved.lse, _own_sinks(sinks, job.plan)), job)
    buffer, rows = joined(saved[:3]) if exchange is not None else (None, [torch.empty_like(x) for x in saved[:3]])
    with _without_autocast(dout):
        dq, dk, dv = _backward(job.backward, dout, saved, kept, rows)
    if exchange is None or job.ulysses is None or buffer is None:
        return dq.finish(), dk.finish(), dv.finish(), dsinks
    head_dim, value_dim = saved.k.shape[2], saved.v.shape[2]
    keys = [("key", head_dim), ("key", value_dim)]
    if job.plan.sums_copies:
        (queries,) = to_tokens(dq.finish().flatten(1), [("query", head_dim)], exchange, job.ulysses)
        wide = torch.cat([dk.sums(True).flatten(1), dv.sums(True).flatten(1)], 1)
        both = to_tokens(wide, keys, exchange, job.ulysses)
    else:
        for grad in (dq, dk, dv):
            grad.finish()
        queries, *both = to_tokens(buffer, [("query", head_dim), *keys], exchange, job.ulysses)
    dkeys, dvalues = (all_keys(parts, exchange, job.key_heads).to(dout.dtype) for parts in both)
    return all_queries(queries), dkeys, dvalues, dsinks


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


def _cast_stages(job: Job, k: Tensor, v: Tensor) -> Iterator[tuple[Stage, Tensor, Tensor]]:
    """The later stages with their keys and values. While one is being computed the next is on its way.

    The first is posted when the iterator is asked for the first time, so whoever wants to compute meanwhile primes it.
    """
    stages = job.plan.stages[1:]
    cast = KeyCast.post(stages[0], job.ring, k, v) if stages else None
    yield job.plan.stages[0], k, v
    for number, stage in enumerate(stages):
        assert cast is not None
        keys, values = cast.wait()
        cast = KeyCast.post(stages[number + 1], job.ring, k, v) if number + 1 < len(stages) else None
        yield stage, keys, values
        del keys, values


def _forward(job: Job, q: Tensor, k: Tensor, v: Tensor, keep: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Out (n, H, V), lse (H, n), and the cast keys and values if they are to be kept."""
    plan = job.plan
    acc = Accumulator(q.new_empty(q.shape[0], q.shape[1], v.shape[2]), plan.shared_q, plan.uncovered)
    if plan.only_call is not None and len(plan.stages) == 1 and q.shape[1]:
        call = plan.only_call
        read = slice(*call.k)
        options = _options(job, plan.stages[0], call)
        return acc.rows, job.backend.forward(q, k[read], v[read], call, options, acc.rows), []
    lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=accumulation_dtype(q.dtype))
    kept: list[Tensor] = []
    for stage, keys, values in _cast_stages(job, k, v):
        _run_calls(job, stage, q, keys, values, acc, lse)
        if keep and stage is not plan.stages[0]:
            kept += [keys, values]
    return acc.finish(), lse, kept


def _run_calls(job: Job, stage: Stage, q: Tensor, k: Tensor, v: Tensor, acc: Accumulator, lse: Tensor) -> None:
    """Run a stage's calls. Every call writes its rows of `out` in place; rows that are shared are then merged."""
    if not q.shape[1]:
        return
    for call in stage.calls:
        rows, keys = slice(*call.q), slice(*call.k)
        part_lse = job.backend.forward(q[rows], k[keys], v[keys], call, _options(job, stage, call), acc.rows[rows])
        a, b = acc.inside(call.q)
        if a < b:
            merge_(acc.wide_rows(a, b), lse[:, a:b], acc.rows[a:b], part_lse[:, _shifted((a, b), call.q[0])])
        for span in acc.outside(call.q):
            lse[:, slice(*span)] = part_lse[:, _shifted(span, call.q[0])]


def _backward(
    job: Job, dout: Tensor, saved: Saved, kept: list[Tensor], rows: list[Tensor]
) -> tuple[Accumulator, Accumulator, Accumulator]:
    """Gradients of q, k, v of this rank's rows, into `rows`. The local stage comes last and hides the last reduce."""
    plan, (q, k, v, out, lse) = job.plan, saved
    forward = dout, q, out, lse
    # Gradients of a head's copies are added after the exchange: they must not be rounded before.
    shared_k = (0, plan.rows) if job.adds and plan.sums_copies else plan.shared_k
    dq = Accumulator(rows[0], plan.shared_q, plan.uncovered)
    dk, dv = (Accumulator(x, shared_k, plan.unread) for x in rows[1:])
    stages: Iterator[tuple[Stage, Tensor, Tensor]]
    if kept:
        pairs = zip(kept[::2], kept[1::2], strict=True)
        stages = iter([(stage, *pair) for stage, pair in zip(plan.stages[1:], pairs, strict=True)])
    else:
        stages = _cast_stages(job, k, v)
        next(stages)
    reduce: KeyReduce | None = None
    for stage, keys, values in stages:
        # What travels in float32 is not rounded before.
        summed = stage.overlapping_keys or (job.adds and plan.wide_reduce)
        shared = (0, stage.rows) if summed else (0, 0)
        dkeys, dvalues = (Accumulator(torch.empty_like(x), shared, stage.unread) for x in (keys, values))
        _run_backward_calls(job, stage, forward, keys, values, dq, dkeys, dvalues)
        if reduce is not None:
            reduce.wait(dk, dv)  # the gradients of two stages at most are alive
        reduce = KeyReduce.post(stage, job.ring, dkeys, dvalues, plan.wide_reduce)
        del keys, values, dkeys, dvalues
    _run_backward_calls(job, plan.stages[0], forward, k, v, dq, dk, dv)
    if reduce is not None:
        reduce.wait(dk, dv)
    return dq, dk, dv


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
    """Run a stage's calls backward. Kernels write gradient rows in place, and add those that are shared: the kernel
    itself if it can, else here, from rounded parts."""
    dout, q, out, lse = forward
    if not q.shape[1]:  # this rank has no head
        return
    for call in stage.calls:
        rows, keys = slice(*call.q), slice(*call.k)
        tensors = dout[rows], q[rows], k[keys], v[keys], out[rows], lse[:, rows]
        if job.adds:
            sums = dq.sum(call.q), dk.sum(call.k), dv.sum(call.k)
            target = Grads(dq.rows[rows], dk.rows[keys], dv.rows[keys], sums)
            job.backend.backward(*tensors, call, _options(job, stage, call), target)
            continue
        target = Grads(dq.rows[rows], _key_rows(dk, call), _key_rows(dv, call))
        job.backend.backward(*tensors, call, _options(job, stage, call), target)
        dq.collect(call.q)
        for grad, written in ((dk, target.dk), (dv, target.dv)):
            for run in call.key_runs:
                if not call.dense_keys:
                    grad.rows[slice(*run)] = written[_shifted(run, call.k[0])]
                grad.collect(run)


def _options(job: Job, stage: Stage, call: Call) -> Options:
    """The options of one call: with dropout also where its rows are in the global stream."""
    if job.dropout is None:
        return job.options
    plan, exchange = job.plan, job.plan.exchange
    keys = plan if stage is plan.stages[0] else stage
    q_index, k_index = (_indices(of, job.device)[slice(*rows)] for of, rows in ((plan, call.q), (keys, call.k)))
    first_head = 0 if exchange is None else exchange.heads[exchange.rank].query[0]
    return replace(job.options, dropout=Dropout(*job.dropout, q_index, k_index, first_head))


def _indices(of: AttentionPlan | Stage, device: torch.device) -> Tensor:
    """Global index of each row, kept with the plan: the layers of a step ask for the same."""
    kept: dict[torch.device, Tensor] = of.__dict__.setdefault("_indices", {})
    if device not in kept:
        kept[device] = to_device(torch.cat([torch.arange(start, stop) for start, stop in of.index]), device)
    return kept[device]


def _key_rows(grad: Accumulator, call: Call) -> Tensor:
    """Where a kernel writes the gradient of a call's keys: in place, unless it would also write rows between them."""
    rows = grad.rows[slice(*call.k)]
    return rows if call.dense_keys else torch.empty_like(rows)


def _shifted(span: Range, base: int) -> slice:
    return slice(span[0] - base, span[1] - base)
