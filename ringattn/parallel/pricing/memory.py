"""The memory of a plan's buffers, beside q, k, v, out and their gradients: what is alive at one time. Pure."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ringattn.parallel.plan.exchange import Exchange
from ringattn.parallel.plan.messages import exchange_messages, rank_widths
from ringattn.parallel.plan.plan import AttentionPlan
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.schedules.stage_work import summed_keys
from ringattn.parallel.transport.buffers import message_buffers

Rows = npt.NDArray[Any]  # (stages), or (stages, ranks)


def buffer_bytes(plan: AttentionPlan, shape: Shape) -> int:
    """The most memory that an attention needs at one time beside q, k, v, out and their gradients, in bytes of a rank.

    Where copy engines move its messages that includes the buffers which they are in: all attentions of a mesh share
    them and they are kept, so of several attentions they count once, with the most that one of them needs.

    Arguments:
        shape: the model's, before any exchange.
    """
    own, last = plan.own(shape), plan.for_pass(backward=True)
    forward = StageRows.of(plan).forward_bytes(own, plan.keep_keys)
    backward = StageRows.of(last).backward_bytes(own, plan.keep_keys, plan.wide_reduce)
    exchanged = 0
    if plan.exchange is not None:
        exchanged = exchange_bytes(
            shape, shape.share(plan.exchange), plan.exchange.position_rows, plan.exchange.own_rows
        )
    largest = largest_messages(plan, shape)
    return int(max(forward, backward)) + exchanged + sum(message_buffers(largest[axis]) for axis in plan.engines)


def largest_messages(plan: AttentionPlan, shape: Shape) -> dict[str, int]:
    """Bytes of the largest message that any rank sends its peers on each axis, all peers together, in either pass."""
    own = plan.own(shape)
    keys = StageRows.of(plan).message_bytes(own, False, plan.keep_keys, plan.wide_reduce)
    grads = StageRows.of(plan.for_pass(backward=True)).message_bytes(own, True, plan.keep_keys, plan.wide_reduce)
    heads = 0
    if plan.exchange is not None:
        heads = exchange_message_bytes(plan.exchange, shape, plan.exchange.position_rows, plan.wide_reduce)
    return {"ring": max(keys, grads), "ulysses": heads}


def exchange_message_bytes(exchange: Exchange, shape: Shape, position_rows: int, wide_reduce: bool) -> int:
    """Bytes of the largest message of an exchange of so many rows, in either pass: one rank's rows for all heads, or
    all rows for one rank's heads; at least 1, since an exchange is made even of nothing."""
    own_rows, most = -(-position_rows // len(exchange.rows)), 1.0
    for backward in (False, True):
        there, back = exchange_messages(exchange, shape, backward, wide_reduce, exchange.groups)
        most = max(most, *(own_rows * sum(rank_widths(exchange, widths)) for widths in there))
        most = max(most, *(position_rows * max(rank_widths(exchange, widths)) for widths in back))
    return math.ceil(most)


@dataclass(frozen=True)
class StageRows:
    """Rows that decide the memory of a schedule, of one rank or of many.

    Arguments:
        buffers, received, sent: key rows of each later stage: of its buffer, that arrive for it, and that the rank
            sends to others.
        shared_q, shared_k: rows accumulated in float32.
        most_sent, most_returned: rows of the largest cast, and reduce, that any position sends in a stage.
        engines: messages that are sent are in the buffers of copy engines, and take no memory beside those.
        chunks: of heads, one computed after another. Heads and their bytes are those of one, but all keep their keys.
    """

    buffers: Rows
    received: Rows
    sent: Rows
    shared_q: Any
    shared_k: Any
    most_sent: int = 0
    most_returned: int = 0
    engines: bool = False
    chunks: int = 1

    @classmethod
    def of(cls, plan: AttentionPlan) -> "StageRows":
        """Those of one rank's stages in one pass."""
        rows = [(stage.rows, stage.cast.received, stage.cast.sent) for stage in plan.stages[1:]]
        buffers, received, sent = np.array(rows, dtype=np.int64).reshape(-1, 3).T
        return cls(
            buffers=buffers,
            received=received,
            sent=sent,
            shared_q=plan.shared_q[1] - plan.shared_q[0],
            shared_k=summed_keys(plan),
            most_sent=max((stage.cast.most for stage in plan.stages), default=0),
            most_returned=max((stage.back.most for stage in plan.stages), default=0),
            engines="ring" in plan.engines,
            chunks=plan.head_chunks,
        )

    def forward_bytes(self, own: Shape, keep_keys: bool) -> Any:
        """The keys of a stage, what travels for the next, and the accumulated output."""
        held = _among_zeros(1, np.cumsum(self.buffers, 0) if keep_keys else self.buffers, 0)
        before = self.buffers.sum(0) * (self.chunks - 1) * keep_keys
        most = np.max(held + self._posted(1), 0) + before
        return most * own.key_row_bytes + self.shared_q * own.query_heads * own.value_dim * own.wide

    def backward_bytes(self, own: Shape, keep_keys: bool, wide_reduce: bool) -> Any:
        """What `forward_bytes` counts, with the gradients of a stage's keys, as kernels leave them and as they travel,
        those of the stage before it on their way back, and the sums."""
        travels = own.wide_key_row_bytes if wide_reduce else own.key_row_bytes
        grads = self.buffers * (own.key_row_bytes + own.wide_key_row_bytes)
        returning = grads + ((0 if self.engines else self.received) + self.sent) * travels
        # While a stage is computed the one before it returns; first there is the first cast alone, last a reduce.
        alive = _among_zeros(2, returning, 0) + _among_zeros(1, grads, 1)
        if keep_keys:
            alive = alive + self.buffers.sum(0) * self.chunks * own.key_row_bytes
        else:
            posted = self._posted(2)
            alive = alive + (_among_zeros(1, self.buffers, 1) + posted) * own.key_row_bytes
            # Before it is computed: what returns, and the cast of what may itself need few keys and send many.
            alive[1:-1] = np.maximum(alive[1:-1], returning + posted[1:-1] * own.key_row_bytes)
        sums = self.shared_q * own.query_heads * own.head_dim * own.wide + self.shared_k * own.wide_key_row_bytes
        return np.max(alive, 0) + sums

    def message_bytes(self, own: Shape, backward: bool, keep_keys: bool, wide_reduce: bool) -> int:
        """Bytes of the largest message that any position sends in a pass."""
        cast = self.most_sent * own.key_row_bytes
        if not backward:
            return cast
        travels = own.wide_key_row_bytes if wide_reduce else own.key_row_bytes
        return max(0 if keep_keys else cast, self.most_returned * travels)

    @property
    def largest_pair(self) -> Any:
        """The most rows of the buffers of two stages that follow one another, if they were of all heads."""
        rows = np.max(self.buffers + _among_zeros(0, self.buffers[1:], 1)[: len(self.buffers)], 0, initial=0)
        return rows / self.chunks

    def _posted(self, after: int) -> Rows:
        """Rows of the cast under way during each stage: of the next one, and then of the first of the next chunk, which
        is waited for later."""
        casts = _among_zeros(0, self._casts, after)
        if self.chunks > 1 and len(self._casts):
            casts[-after:] = (0 if self.engines else self.sent[0]) + self.received[0]
        return casts

    @cached_property
    def _casts(self) -> Rows:
        """Rows of the messages of each cast: those that are sent and those that arrive, or these and the buffer."""
        return np.maximum(0 if self.engines else self.sent, self.buffers) + self.received


def _among_zeros(before: int, rows: Rows, after: int) -> Rows:
    """With so many stages of nothing before and after."""
    out = np.zeros((before + len(rows) + after, *rows.shape[1:]), rows.dtype)
    out[before : before + len(rows)] = rows
    return out


def exchange_bytes(shape: Shape, own: Shape, position_rows: Any, own_rows: Any) -> Any:
    """q, k, v and out of a rank's heads for all rows of the position, and a message with all heads of its own rows."""
    return position_rows * own.row_bytes + own_rows * shape.row_bytes
