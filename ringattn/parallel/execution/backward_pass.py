"""The backward pass of one part of an attention: its stages, with the exchange of heads around them.

Legend: t local tokens, n tokens of the ring position, H and K query and key heads, D head dim, V value head dim.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.kernels.merge import sinks_grad
from ringattn.parallel.execution.accumulator import Accumulator, view_rows
from ringattn.parallel.execution.head_exchange import Columns, HeadExchange, Returning
from ringattn.parallel.execution.job import Job, Saved, Steps
from ringattn.parallel.execution.stages import backward_stages


class LocalGrads:
    """Gradients of the rank's q, k and v, made when the first of its parts has something to write: memory that no
    pass needs while it computes."""

    def __init__(self, dout: Tensor, shapes: Sequence[tuple[int, int]]) -> None:
        self._dout, self._shapes = dout, shapes

    @cached_property
    def tensors(self) -> list[Tensor]:
        return [self._dout.new_empty(self._dout.shape[0], *shape) for shape in self._shapes]

    def rows_of(self, job: Job) -> list[Tensor]:
        """Those of the tokens of one part."""
        return [view_rows(x, job.rows) for x in self.tensors]


def backward_pass(
    job: Job, dout: Tensor, saved: Sequence[Saved], sinks: Tensor | None, kept: list[Tensor], grads: LocalGrads
) -> Steps[Tensor | None]:
    """dq (t, H, D), dk (t, K, D), dv (t, K, V) of the local tokens into `grads`; the gradient of the sinks (H,)."""
    dout = dout.contiguous()
    if job.exchange is not None:
        return (yield from _exchanged_backward(job, job.exchange, dout, saved, sinks, kept, grads))
    (whole,) = saved
    dsinks = None if sinks is None else sinks_grad(dout, whole.out, whole.lse, sinks)
    for grad in (yield from backward_stages(job.backward, dout, whole, kept, grads.rows_of(job))):
        grad.finish()
    return dsinks


def _exchanged_backward(
    job: Job,
    exchange: HeadExchange,
    dout: Tensor,
    saved: Sequence[Saved],
    sinks: Tensor | None,
    kept: list[Tensor],
    local_grads: LocalGrads,
) -> Steps[Tensor | None]:
    """While a group of heads is computed the output's gradient of the next arrives and that of the last's queries
    leaves. Gradients of keys leave with the last, or after it if they are wider."""
    leaving, dsinks = yield from _backward_groups(job, exchange, dout, saved, sinks, kept)
    yield
    # The memory peak of a model may be here: the tensors that gradients were computed from have gone with the locals
    # of the functions above, before there is room made for what the gradients become.
    for one, filled in leaving:
        one.wait(local_grads.rows_of(job)[filled])
    return dsinks


class _Leaving(NamedTuple):
    """Gradients on their way to the ranks that hold the tokens."""

    returning: Returning
    filled: slice  # which of dq, dk and dv


def _backward_groups(
    job: Job, exchange: HeadExchange, dout: Tensor, saved: Sequence[Saved], sinks: Tensor | None, kept: list[Tensor]
) -> Steps[tuple[list[_Leaving], Tensor | None]]:
    """What leaves of all groups of heads, and the gradient of the sinks of this rank's heads."""
    dsinks = None if sinks is None else torch.zeros_like(sinks)  # 0 for other ranks' heads: ranks add them up
    leaving: list[_Leaving] = []
    totals: list[Tensor] = []  # gradients of all the rank's key heads, in the precision of sums
    arriving = exchange.to_heads([dout], [])
    for group, way, of_group in zip(job.groups, exchange.groups, saved, strict=True):
        yield
        (own_dout,) = arriving.wait()
        if not way.last:
            arriving = exchange.groups[way.group + 1].to_heads([dout], [])
        if sinks is not None and dsinks is not None:
            heads = slice(*group.heads)
            dsinks[heads] = sinks_grad(own_dout, of_group.out, of_group.lse, sinks[heads])
        leaving.append((yield from _backward_group(group, way, own_dout, of_group, kept, totals)))
    if job.plan.sums_copies:
        wide = torch.cat([total.flatten(1) for total in totals], 1)
        columns = [Columns("key", total.shape[2]) for total in totals]
        leaving.append(_Leaving(exchange.to_tokens(wide, columns), slice(1, 3)))
    return leaving, dsinks


def _backward_group(
    group: Job, way: HeadExchange, dout: Tensor, saved: Saved, kept: list[Tensor], totals: list[Tensor]
) -> Steps[_Leaving]:
    """The gradients of one group of heads, of all tokens of the position; dout (n, heads of the group, V). Those of
    keys are added to `totals`, unless they can leave from where kernels write them."""
    with_keys = way.last and not group.plan.sums_copies
    columns = [Columns("query", saved.k.shape[2])]
    if with_keys:
        columns += [Columns("key", x.shape[2]) for x in (saved.k, saved.v)]
    message, rows = way.open_message(columns, dout)
    direct = with_keys and way.plan.groups == 1
    targets = rows if direct else [rows[0], *saved.new_key_grads()]
    dq, *grads = yield from backward_stages(group.backward, dout, saved, kept, targets)
    dq.finish()
    if direct:
        for grad in grads:
            grad.finish()
    else:
        _add_key_grads(totals, way, grads)
        for target, total in zip(rows[1:], totals, strict=False):
            target.copy_(total)
    return _Leaving(way.to_tokens(message, columns), slice(len(columns)))


def _add_key_grads(totals: list[Tensor], way: HeadExchange, grads: Sequence[Accumulator]) -> None:
    """Gradients of a group's heads to those of all the rank's key heads; of none yet, if it is the first group."""
    if way.plan.groups == 1:
        totals += [grad.sums() for grad in grads]
        return
    if not totals:
        heads = len(way.plan.share.keys)
        totals += [g.rows.new_zeros(len(g.rows), heads, g.rows.shape[2], dtype=g.dtype) for g in grads]
    for total, grad in zip(totals, grads, strict=True):
        total[:, way.own_keys] += grad.sums()
