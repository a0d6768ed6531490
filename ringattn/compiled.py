"""Attention as `torch.library` operators, so that `torch.compile(fullgraph=True)` passes through.

The operators do what `parallel_attention` does outside of a graph. What differs from batch to batch, the layout, comes
as a tensor with its number, so that a graph is not compiled again for other documents. With an exchange the tensors for
the backward pass have shapes that only the layout knows: they travel as flat tensors of unknown length, those of all
parts of the layout that have one end to end.
"""

import math
from collections.abc import Sequence
from types import NoneType
from typing import Any, get_args

import torch
from torch import Tensor

from ringattn.kernels.spec import accumulation_dtype
from ringattn.numbered import by_number
from ringattn.parallel.execution.accumulator import view_rows
from ringattn.parallel.execution.executor import backward_parts, forward_parts, joined_lse
from ringattn.parallel.execution.job import Job, Saved
from ringattn.parallel.layout import Layout
from ringattn.preparation import check_kinds, compute, prepare
from ringattn.settings import AttentionOptions

_CALLS = "_compiled_calls"
_SCHEMA_TYPES = {bool: "bool", int: "int", float: "float", str: "str", tuple[int, int]: "int[]"}


def _schema_type(of: Any) -> str:
    """The type of an operator's argument, in the words of operator schemas."""
    if of in _SCHEMA_TYPES:
        return _SCHEMA_TYPES[of]
    (inner,) = (one for one in get_args(of) if one is not NoneType)
    return f"{_SCHEMA_TYPES[inner]}?"


_CONSTANTS = ", ".join(f"{_schema_type(of)} {name}" for name, of in AttentionOptions.constant_types().items())
_ARGUMENTS = f"Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor layout, {_CONSTANTS}, str[] meshes"


def attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, layout: Layout, options: AttentionOptions, *meshes: str
) -> tuple[Tensor, Tensor]:
    """out (t, H, V) and lse (H, t); what `parallel_attention` calls while a graph is traced.

    Arguments:
        meshes: of which the layout must be, in words. The operator looks, which sees every layout, and not the trace.

    Keys are cast again in the backward pass: a graph has no place for buffers whose shapes it does not know. Dropout
    breaks the graph, and fullgraph=True refuses it.
    """
    check_kinds(layout, options)
    if options.dropout_p:
        return _outside(q, k, v, sinks, layout, options, *meshes)
    # A seed without dropout would only compile another graph for every number.
    constants = options._replace(keep_keys=False, dropout_seed=None).to_constants()
    out, lse, *_ = _attend(q, k, v, sinks, layout._number, *constants, list(meshes))
    return out, lse


@torch.compiler.disable(reason="attention dropout, whose seed would compile another graph at every step")
def _outside(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, layout: Layout, options: AttentionOptions, *meshes: str
) -> tuple[Tensor, Tensor]:
    _check_mesh(layout, meshes)
    return compute(q, k, v, sinks, layout, options)


def _check_mesh(layout: Layout, meshes: Sequence[str]) -> None:
    if meshes and str(layout.mesh) not in meshes:
        raise ValueError(f"layout was made for {layout.mesh}, this attention for {meshes[0]}")


def compiled_calls(layout: Layout) -> int:
    """Forward calls of the operator on this layout: a graph cannot tell by itself that attention ran."""
    return layout.__dict__.get(_CALLS, 0)


def reset_compiled_calls(layout: Layout) -> None:
    layout.__dict__.pop(_CALLS, None)


def _jobs(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, number: Tensor, *constants: Any) -> tuple[Job, ...]:
    layout: Layout = by_number(number)
    *values, meshes = constants
    _check_mesh(layout, meshes)
    return prepare(q, k, v, sinks, layout, AttentionOptions.from_constants(values))


@torch.library.custom_op(
    "ringattn::attend",
    mutates_args=(),
    schema=f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, layout: Tensor, *constants: Any) -> tuple[Any, ...]:
    """out, lse, and what the backward pass needs of parts with an exchange: q, k, v, out end to end; and lse."""
    jobs = _jobs(q, k, v, sinks, layout, *constants)
    counts = by_number(layout).__dict__
    counts[_CALLS] = counts.get(_CALLS, 0) + 1
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    done = forward_parts(jobs, q, k, v, sinks, out, keep=False)
    lses = [
        one.lse
        if job.return_lse or job.plan.exchange is None
        else one.lse.new_empty(q.shape[1], job.rows[1] - job.rows[0])
        for job, one in zip(jobs, done, strict=True)
    ]
    lse = joined_lse(lses).contiguous()
    exchanged = [of for job, one in zip(jobs, done, strict=True) if job.plan.exchange is not None for of in one.saved]
    flat = [x.reshape(-1) for of in exchanged for x in of[:4]]
    flat_lse = [of.lse.reshape(-1) for of in exchanged]
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
    schema=f"(Tensor dout, Tensor out, Tensor lse, Tensor saved, Tensor saved_lse, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _attend_backward(
    dout: Tensor, out: Tensor, lse: Tensor, saved: Tensor, saved_lse: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and the gradient of the sinks (of no element without them)."""
    q, k, v, sinks, *_ = inputs
    jobs, kept = _jobs(*inputs), []
    for job in jobs:
        if job.plan.exchange is None:
            own = [view_rows(x, job.rows).contiguous() for x in (q, k, v, out)]
            kept.append([Saved(own[0], own[1], own[2], own[3], lse[:, slice(*job.rows)])])
            continue
        found = _unpacked(job, saved, saved_lse, q.shape[2], v.shape[2])
        saved = saved[sum(x.numel() for of in found for x in of[:4]) :]
        saved_lse = saved_lse[sum(of.lse.numel() for of in found) :]
        kept.append(found)
    dq, dk, dv, dsinks = backward_parts(jobs, dout, kept, sinks, [[] for _ in jobs])
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


def _unpacked(job: Job, saved: Tensor, saved_lse: Tensor, head_dim: int, value_dim: int) -> list[Saved]:
    """What was saved of each group of heads of a part with an exchange, from the beginning of the flat tensors."""
    exchange = job.plan.exchange
    assert exchange is not None
    rows, found = exchange.position_rows, []
    for group in job.groups:
        (first, last), (first_key, last_key) = exchange.share.group(group.group, exchange.groups)
        queries, keys = last - first, last_key - first_key
        heads = (queries, head_dim), (keys, head_dim), (keys, value_dim), (queries, value_dim)
        shapes = [(rows, *pair) for pair in heads]
        sizes = [math.prod(shape) for shape in shapes]
        q, k, v, out = (x.view(shape) for x, shape in zip(saved[: sum(sizes)].split(sizes), shapes, strict=True))
        found.append(Saved(q, k, v, out, saved_lse[: queries * rows].view(queries, rows)))
        saved, saved_lse = saved[sum(sizes) :], saved_lse[queries * rows :]
    return found


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
