"""Attention as `torch.library` operators, so that `torch.compile(fullgraph=True)` passes through.

The operators do what `parallel_attention` does outside of a graph. What differs from batch to batch, the layout, comes
as a tensor with its number, so that a graph is not compiled again for other documents. With an exchange the tensors for
the backward pass have shapes that only the layout knows: they travel as flat tensors of unknown length, those of all
parts of the layout that have one end to end.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ringattn.attention import Settings, prepare
from ringattn.kernels.spec import accumulation_dtype
from ringattn.mask import Mask
from ringattn.parallel.executor import (
    Job,
    Saved,
    backward_pass,
    forward_part,
    joined_grads,
    joined_parts,
    part_rows,
)
from ringattn.parallel.layout import Layout
from ringattn.parallel.numbered import by_number

_CALLS = "compiled calls"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor layout"
_CONSTANTS = (
    "bool causal, int left, int right, int? chunk, float? softmax_scale, float? softcap, float dropout_p, "
    "bool deterministic, str backend, str scheme, int? stages, bool wide_reduce, int? memory_limit, bool return_lse"
)


def attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, layout: Layout, settings: Settings
) -> tuple[Tensor, Tensor]:
    """out (t, H, V) and lse (H, t); what `parallel_attention` calls while a graph is traced.

    Keys are cast again in the backward pass: a graph has no place for buffers whose shapes it does not know.
    """
    if settings.dropout_p:
        raise NotImplementedError("dropout under torch.compile: its seed would compile a graph for every step")
    mask, (left, right) = settings.mask, settings.mask.window
    constants = (mask.causal, left, right, mask.chunk, settings.softmax_scale, settings.softcap, settings.dropout_p)
    constants += (settings.deterministic, settings.backend, settings.scheme, settings.stages)  # type: ignore[assignment]
    constants += (settings.wide_reduce, settings.memory_limit, settings.return_lse)  # type: ignore[assignment]
    out, lse, *_ = _attend(q, k, v, sinks, layout._number, *constants)
    return out, lse


def compiled_calls(layout: Layout) -> int:
    """Forward calls of the operator on this layout: a graph cannot tell by itself that attention ran."""
    return layout._plans.get(_CALLS, 0)


def reset_compiled_calls(layout: Layout) -> None:
    layout._plans.pop(_CALLS, None)


def _jobs(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, layout: Tensor, *constants: Any) -> tuple[Job, ...]:
    causal, left, right, chunk, scale, softcap, dropout_p, *rest = constants
    deterministic, backend, scheme, stages, wide, memory_limit, lse = rest
    settings = Settings(
        mask=Mask(causal, (left, right), chunk),
        softmax_scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
        dropout_seed=None,
        deterministic=deterministic,
        backend=backend,
        scheme=scheme,
        stages=stages,
        keep_keys=False,
        wide_reduce=wide,
        memory_limit=memory_limit,
        return_lse=lse,
    )
    return prepare(q, k, v, sinks, by_number(int(layout)), settings)


@torch.library.custom_op(
    "ringattn::attend",
    mutates_args=(),
    schema=f"({_INPUTS}, {_CONSTANTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, layout: Tensor, *constants: Any) -> tuple[Any, ...]:
    """out, lse, and what the backward pass needs of parts with an exchange: q, k, v, out end to end; and lse."""
    jobs = _jobs(q, k, v, sinks, layout, *constants)
    plans = by_number(int(layout))._plans
    plans[_CALLS] = plans.get(_CALLS, 0) + 1
    done = [forward_part(job, q, k, v, sinks, keep=False) for job in jobs]
    lses = [
        lse if job.return_lse or job.plan.exchange is None else saved.lse.new_empty(q.shape[1], len(out))
        for job, (out, lse, saved, _) in zip(jobs, done, strict=True)
    ]
    out, lse = joined_parts([out for out, *_ in done]), joined_parts(lses, 1)
    exchanged = [saved for job, (_, _, saved, _) in zip(jobs, done, strict=True) if job.plan.exchange is not None]
    flat = [x.reshape(-1) for saved in exchanged for x in saved[:4]]
    flat_lse = [saved.lse.reshape(-1) for saved in exchanged]
    return out, lse, torch.cat([q.new_empty(0), *flat]), torch.cat([lse.new_empty(0), *flat_lse])


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size, lse_size = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))
    dtype = accumulation_dtype(q.dtype)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=dtype)
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    return out, lse, q.new_empty(size), q.new_empty(lse_size, dtype=dtype)


@torch.library.custom_op(
    "ringattn::attend_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor out, Tensor lse, Tensor saved, Tensor saved_lse, {_INPUTS}, {_CONSTANTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _attend_backward(
    dout: Tensor, out: Tensor, lse: Tensor, saved: Tensor, saved_lse: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and the gradient of the sinks (of no element without them)."""
    q, k, v, sinks, *_ = inputs
    done = []
    for job in _jobs(*inputs):
        if job.plan.exchange is None:
            own = [part_rows(x, job).contiguous() for x in (q, k, v, out)]
            kept = Saved(own[0], own[1], own[2], own[3], lse[:, slice(*job.rows)])
        else:
            kept = _unpacked(job, saved, saved_lse, q.shape[2], v.shape[2])
            saved, saved_lse = saved[sum(x.numel() for x in kept[:4]) :], saved_lse[kept.lse.numel() :]
        done.append(backward_pass(job, part_rows(dout, job), kept, sinks, []))
    dq, dk, dv, dsinks = joined_grads(done)
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


def _unpacked(job: Job, saved: Tensor, saved_lse: Tensor, head_dim: int, value_dim: int) -> Saved:
    """What was saved of a part with an exchange, from the beginning of the flat tensors."""
    exchange = job.plan.exchange
    assert exchange is not None
    share = exchange.heads[exchange.rank]
    rows, queries, keys = exchange.position_rows, share.queries, len(share.keys)
    heads = (queries, head_dim), (keys, head_dim), (keys, value_dim), (queries, value_dim)
    shapes = [(rows, *pair) for pair in heads]
    sizes = [math.prod(shape) for shape in shapes]
    parts = saved[: sum(sizes)].split(sizes)
    q, k, v, out = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
    return Saved(q, k, v, out, saved_lse[: queries * rows].view(queries, rows))


@_attend_backward.register_fake
def _(
    dout: Tensor, out: Tensor, lse: Tensor, saved: Tensor, saved_lse: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, sinks, *_ = inputs
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, sinks, layout, *ctx.constants = inputs
    ctx.save_for_backward(*output, q, k, v, sinks, layout)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Any, ...]:
    *tensors, sinks, layout = ctx.saved_tensors
    dq, dk, dv, dsinks = _attend_backward(dout, *tensors, sinks, layout, *ctx.constants)
    return dq, dk, dv, None if sinks is None else dsinks, None, *[None] * len(ctx.constants)


_attend.register_autograd(_backward, setup_context=_setup)
