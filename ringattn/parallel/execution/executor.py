"""Running a plan: one autograd function for every scheme, and the exchange of heads around the stages.

Legend: t local tokens, n tokens of the ring position (n = t without an exchange), H and K query and key heads (after
the exchange: this rank's), D head dim, V value head dim. `q_tHD`, `lse_Hn`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringattn.kernels.merge import apply_sinks_
from ringattn.kernels.spec import Range
from ringattn.parallel.execution.accumulator import view_rows
from ringattn.parallel.execution.backward_pass import LocalGrads, backward_pass
from ringattn.parallel.execution.head_exchange import Columns, HeadExchange
from ringattn.parallel.execution.job import Job, Saved, Steps, T
from ringattn.parallel.execution.recall import Attended, Results, attention_begins
from ringattn.parallel.execution.stages import forward_stages


def take_turns(passes: Sequence[Steps[T]]) -> list[T]:
    """The results of several passes: where one would wait for a transfer the next goes on."""
    results: dict[int, T] = {}
    while len(results) < len(passes):
        for number, steps in enumerate(passes):
            if number not in results:
                try:
                    next(steps)
                except StopIteration as stop:
                    results[number] = stop.value
    return [results[number] for number in range(len(passes))]


def run(jobs: Sequence[Job], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention of the local tokens: q (t, H, D), k (t, K, D), v (t, K, V) -> out (t, H, V), lse (H, t).

    Arguments:
        jobs: of the parts, whose rows are those of the tensors one after another.

    Collective over the sequence ranks, and so is its backward pass: the loss of every rank must depend on its `out`,
    and several calls may be in flight as long as all ranks go through them in the same order. The lse has no gradient,
    and is of this rank's tokens only if the jobs ask for it.
    """
    return _Attention.apply(q, k, v, sinks, jobs)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """The reference backend's sums are matrix products too, and must stay as wide as they are."""
    if not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, jobs: Sequence[Job]
    ) -> tuple[Tensor, Tensor]:
        attended = attention_begins(jobs)
        if attended is not None and attended.replays and len(jobs) == 1 and jobs[0].exchange is None:
            out = attended.known(_part_of(jobs[0])).out
        else:
            out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        done = forward_parts(jobs, q, k, v, sinks, out, any(ctx.needs_input_grad[:3]), attended)
        ctx.jobs, ctx.kept = jobs, [len(one.kept) for one in done]
        ctx.save_for_backward(sinks, *(x for one in done for tensors in (*one.saved, one.kept) for x in tensors))
        lse = joined_lse([one.lse for one in done]) if jobs[0].return_lse else done[0].lse
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        # What is saved of several parts are views of `out`, and must not keep the graph alive that keeps them.
        return out if len(jobs) == 1 else out.detach(), lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dout = grads[0]
        if dout is None:  # out was not used; see `run`
            return None, None, None, None, None
        sinks, *tensors = ctx.saved_tensors
        saved, kept = [], []
        for job, count in zip(ctx.jobs, ctx.kept, strict=True):
            saved.append([Saved(*tensors[5 * number : 5 * number + 5]) for number in range(len(job.groups))])
            tensors = tensors[5 * len(job.groups) :]
            kept.append(tensors[:count])
            tensors = tensors[count:]
        return *backward_parts(ctx.jobs, dout, saved, sinks, kept), None


class Forward(NamedTuple):
    """The forward pass of a job, beside its output."""

    lse: Tensor  # (H, t), but of this rank's tokens only if the job asks for it
    saved: list[Saved]  # what the backward pass needs of each group of heads
    kept: list[Tensor]  # cast keys and values


def forward_parts(
    jobs: Sequence[Job],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    keep: bool,
    attended: Attended | None = None,
) -> list[Forward]:
    """The forward pass of each part, on its rows of the rank's tensors, into those of `out`. What one waits for travels
    while another is computed.

    Arguments:
        keep: those parts whose plans say so keep their cast keys.
        attended: where results are noted, or taken from instead of being computed.
    """
    with without_autocast(q):
        passes = []
        for job in jobs:
            own_q, own_k, own_v, own_out = (view_rows(x, job.rows) for x in (q, k, v, out))
            kept = keep and job.plan.keep_keys
            passes.append(forward_pass(job, own_q, own_k, own_v, sinks, own_out, kept, attended))
        done = take_turns(passes)
    if attended is not None and not attended.replays:
        attended.end()
    return done


def backward_parts(
    jobs: Sequence[Job],
    dout: Tensor,
    saved: Sequence[Sequence[Saved]],
    sinks: Tensor | None,
    kept: Sequence[list[Tensor]],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq (t, H, D), dk (t, K, D), dv (t, K, V) of the rank's tokens and the gradient of the sinks (H,)."""
    job, first = jobs[0], saved[0][0]
    head_dim, value_dim = first.k.shape[2], first.v.shape[2]
    shapes = (job.query_heads, head_dim), (job.key_heads, head_dim), (job.key_heads, value_dim)
    grads = LocalGrads(dout, shapes)
    with without_autocast(dout):
        passes = [
            backward_pass(job, view_rows(dout, job.rows), own, sinks, keys, grads)
            for job, own, keys in zip(jobs, saved, kept, strict=True)
        ]
        dsinks = [one for one in take_turns(passes) if one is not None]
    dq, dk, dv = grads.tensors
    return dq, dk, dv, sum(dsinks[1:], dsinks[0]) if dsinks else None


def joined_lse(parts: Sequence[Tensor]) -> Tensor:
    """The lse (H, t) of all the rank's tokens, from those of its parts."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def forward_pass(
    job: Job,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    keep: bool,
    attended: Attended | None,
) -> Steps[Forward]:
    """The forward pass of q (t, H, D), k (t, K, D), v (t, K, V) into out (t, H, V)."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if job.exchange is not None:
        return (yield from _exchanged_forward(job, job.exchange, (q, k, v), sinks, out, keep, attended))
    lse, kept = yield from _attend(job, (q, k, v), sinks, out, keep, attended)
    return Forward(lse, [Saved.of(job, q, k, v, out, lse, kept)], kept)


def _attend(
    job: Job,
    tensors: tuple[Tensor, Tensor, Tensor],
    sinks: Tensor | None,
    out: Tensor,
    keep: bool,
    attended: Attended | None,
) -> Steps[tuple[Tensor, list[Tensor]]]:
    """The stages of a group of heads into `out`, with its sinks; lse and kept keys."""
    if attended is not None and attended.replays:
        known = attended.known(_part_of(job))
        if known.out is not out:
            out.copy_(known.out)
        return known.lse, list(known.kept)
    lse, kept = yield from forward_stages(job, *tensors, out, keep)
    if sinks is not None:
        apply_sinks_(out, lse, sinks)
    if attended is not None:
        attended.note(_part_of(job), Results(out, lse, kept))
    return lse, kept


def _part_of(job: Job) -> tuple[Range, int]:
    """What tells a group of heads of a part from the others of an attention."""
    return job.rows, job.group


def _exchanged_forward(
    job: Job,
    exchange: HeadExchange,
    tensors: Sequence[Tensor],
    sinks: Tensor | None,
    local_out: Tensor,
    keep: bool,
    attended: Attended | None,
) -> Steps[Forward]:
    """While a group of heads is computed the queries of the next arrive and the output of the last leaves."""
    q, k, v = tensors
    arriving = exchange.to_heads([q], [k, v])
    saved, returning = [], []
    keys: list[Tensor] = []
    kept: list[Tensor] = []
    for group, way in zip(job.groups, exchange.groups, strict=True):
        yield
        queries, *first = arriving.wait()
        keys = first or keys
        if not way.last:
            arriving = exchange.groups[way.group + 1].to_heads([q], [])
        own_k, own_v = (x[:, way.own_keys] for x in keys)
        own_sinks = None if sinks is None else sinks[slice(*group.heads)]
        if attended is not None and attended.replays:
            out = attended.known(_part_of(group)).out
        else:
            out = queries.new_empty(*queries.shape[:2], v.shape[2])
        lse, kept = yield from _attend(group, (queries, own_k, own_v), own_sinks, out, keep, attended)
        saved.append(Saved.of(group, queries, own_k, own_v, out, lse, kept))
        back = [way.to_tokens(out.flatten(1), [Columns("query", out.shape[2])])]
        if job.return_lse:
            back.append(way.to_tokens(lse.T, [Columns("query", 1)]))
        returning.append(back)
    yield
    if job.return_lse:
        lse = lse.new_empty(exchange.plan.own_rows, job.query_heads, 1)
    for out_back, *lse_back in returning:
        out_back.wait([local_out])
        for one in lse_back:
            one.wait([lse])
    return Forward(lse.squeeze(-1).T if job.return_lse else lse, saved, kept)
