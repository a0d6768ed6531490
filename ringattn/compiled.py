"""Attention as `torch.library` operators, so that `torch.compile(fullgraph=True)` passes through.

The operators do what `parallel_attention` does outside of a graph. What differs from batch to batch, the layout, comes
as a tensor with its number, so that a graph is not compiled again for other documents. With an exchange the tensors for
the backward pass have shapes that only the layout knows: they travel as flat tensors of unknown length.
"""

import math

import torch
from torch import Tensor

from ringattn.attention import prepare
from ringattn.kernels.spec import accumulation_dtype
from ringattn.mask import Mask
from ringattn.parallel.executor import Job, Saved, backward_pass, forward_pass
from ringattn.parallel.layout import Layout
from ringattn.parallel.numbered import by_number


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    layout: Layout,
    causal: bool,
    left: int,
    right: int,
    chunk: int | None,
    softmax_scale: float | None,
    softcap: float | None,
    dropout_p: float,
    deterministic: bool,
    backend: str,
    scheme: str,
    stages: int | None,
    wide_reduce: bool,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """out (t, H, V) and lse (H, t); what `parallel_attention` calls while a graph is traced.

    Keys are cast again in the backward pass: a graph has no place for buffers whose shapes it does not know.
    """
    out, lse, *_ = _attend(
        q, k, v, sinks, layout._number, causal, left, right, chunk, softmax_scale, softcap, dropout_p, deterministic,
        backend, scheme, stages, wide_reduce, return_lse,
    )  # fmt: skip
    return out, lse


def _job(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    layout: Tensor,
    causal: bool,
    left: int,
    right: int,
    chunk: int | None,
    softmax_scale: float | None,
    softcap: float | None,
    dropout_p: float,
    deterministic: bool,
    backend: str,
    scheme: str,
    stages: int | None,
    wide_reduce: bool,
    return_lse: bool,
) -> Job:
    mask = Mask(causal, (left, right), chunk)
    return prepare(
        q, k, v, by_number(int(layout)), mask, softmax_scale, softcap, dropout_p, sinks, deterministic, backend, scheme,
        stages, False, wide_reduce, return_lse,
    )  # fmt: skip


@torch.library.custom_op("ringattn::attend", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    layout: Tensor,
    causal: bool,
    left: int,
    right: int,
    chunk: int | None,
    softmax_scale: float | None,
    softcap: float | None,
    dropout_p: float,
    deterministic: bool,
    backend: str,
    scheme: str,
    stages: int | None,
    wide_reduce: bool,
    return_lse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse, and with an exchange what the backward pass needs: q, k, v, out end to end, and lse."""
    job = _job(
        q, k, v, sinks, layout, causal, left, right, chunk, softmax_scale, softcap, dropout_p, deterministic, backend,
        scheme, stages, wide_reduce, return_lse,
    )  # fmt: skip
    out, lse, saved, _ = forward_pass(job, q, k, v, sinks, keep=False)
    if job.plan.exchange is None:
        return out, lse, q.new_empty(0), lse.new_empty(0)
    if not job.return_lse:
        lse = lse.new_empty(q.shape[1], q.shape[0])
    return out, lse, torch.cat([x.reshape(-1) for x in saved[:4]]), saved.lse.reshape(-1).clone()


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    lse_size = torch.library.get_ctx().new_dynamic_size()
    dtype = accumulation_dtype(q.dtype)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=dtype)
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    return out, lse, q.new_empty(size), q.new_empty(lse_size, dtype=dtype)


@torch.library.custom_op("ringattn::attend_backward", mutates_args=())
def _attend_backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    saved: Tensor,
    saved_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    layout: Tensor,
    causal: bool,
    left: int,
    right: int,
    chunk: int | None,
    softmax_scale: float | None,
    softcap: float | None,
    dropout_p: float,
    deterministic: bool,
    backend: str,
    scheme: str,
    stages: int | None,
    wide_reduce: bool,
    return_lse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and the gradient of the sinks (of no element without them)."""
    job = _job(
        q, k, v, sinks, layout, causal, left, right, chunk, softmax_scale, softcap, dropout_p, deterministic, backend,
        scheme, stages, wide_reduce, return_lse,
    )  # fmt: skip
    kept = Saved(q.contiguous(), k.contiguous(), v.contiguous(), out, lse)
    if job.plan.exchange is not None:
        kept = _unpacked(job, saved, saved_lse, q.shape[2], v.shape[2])
    dq, dk, dv, dsinks = backward_pass(job, dout, kept, sinks, [])
    return dq, dk, dv, dq.new_empty(0) if dsinks is None else dsinks


def _unpacked(job: Job, saved: Tensor, saved_lse: Tensor, head_dim: int, value_dim: int) -> Saved:
    exchange = job.plan.exchange
    assert exchange is not None
    share = exchange.heads[exchange.rank]
    rows, queries, keys = exchange.position_rows, share.queries, len(share.keys)
    heads = (queries, head_dim), (keys, head_dim), (keys, value_dim), (queries, value_dim)
    shapes = [(rows, *pair) for pair in heads]
    parts = saved.split([math.prod(shape) for shape in shapes])
    tensors = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    return Saved(tensors[0], tensors[1], tensors[2], tensors[3], saved_lse.view(queries, rows))


@_attend_backward.register_fake
def _(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    saved: Tensor,
    saved_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = [x.new_empty(x.shape) for x in (q, k, v)]
    return made[0], made[1], made[2], q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)


def _setup(ctx: object, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, sinks, layout, *ctx.constants = inputs  # type: ignore[attr-defined]
    out, lse, saved, saved_lse = output
    ctx.save_for_backward(out, lse, saved, saved_lse, q, k, v, sinks, layout)  # type: ignore[attr-defined]
    ctx.mark_non_differentiable(lse, saved, saved_lse)  # type: ignore[attr-defined]


def _backward(ctx: object, dout: Tensor, *_: object) -> tuple[object, ...]:
    tensors = ctx.saved_tensors  # type: ignore[attr-defined]
    dq, dk, dv, dsinks = _attend_backward(dout, *tensors, *ctx.constants)  # type: ignore[attr-defined]
    return dq, dk, dv, dsinks if tensors[7] is not None else None, None, *[None] * len(ctx.constants)  # type: ignore[attr-defined]


_attend.register_autograd(_backward, setup_context=_setup)
