"""The memory of a plan's buffers, beside q, k, v, out and their gradients: what is alive at one time. Pure."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from ringattn.parallel.plan import AttentionPlan, Shape


def buffer_bytes(plan: AttentionPlan, shape: Shape) -> int:
    """The most memory that either pass of a rank needs at one time beside q, k, v, out and their gradients, in bytes.

    Arguments:
        shape: the model's, before any exchange.
    """
    own, last = shape.share(plan.exchange), plan.backward or plan
    forward = StageRows.of(plan).forward_bytes(own, plan.keep_keys)
    backward = StageRows.of(last).backward_bytes(own, plan.keep_keys, plan.wide_reduce)
    exchanged = 0
    if plan.exchange is not None:
        exchanged = exchange_bytes(shape, own, plan.exchange.position_rows, plan.exchange.own_rows)
    return int(max(forward, backward)) + exchanged


@dataclass(frozen=True)
class StageRows:
    """Rows that decide the memory of a schedule; numbers of one rank, or arrays of many.

    Arguments:
        buffers, received, sent: key rows of each later stage: of its buffer, that arrive for it, and that the rank
            sends to others.
        shared_q, shared_k: rows accumulated in float32.
    """

    buffers: Sequence[Any]
    received: Sequence[Any]
    sent: Sequence[Any]
    shared_q: Any
    shared_k: Any

    @classmethod
    def of(cls, plan: AttentionPlan) -> "StageRows":
        """Those of one rank's stages in one pass."""
        return cls(
            buffers=[stage.rows for stage in plan.stages[1:]],
            received=[stage.cast.received for stage in plan.stages[1:]],
            sent=[stage.cast.sent for stage in plan.stages[1:]],
            shared_q=plan.shared_q[1] - plan.shared_q[0],
            shared_k=0 if plan.single_parts else plan.shared_k[1] - plan.shared_k[0],
        )

    def forward_bytes(self, own: Shape, keep_keys: bool) -> Any:
        """The keys of a stage, what travels for the next, and the accumulated output."""
        most = self._most([0, *self.buffers], self._casts, keep_keys)
        return most * own.key_row_bytes + self.shared_q * own.query_heads * own.value_dim * own.wide

    def backward_bytes(self, own: Shape, keep_keys: bool, wide_reduce: bool) -> Any:
        """The same with the gradients of a stage's keys, as kernels leave them and as they travel, those of the stage
        before it on their way back, and the sums."""
        travels = own.wide_key_row_bytes if wide_reduce else own.key_row_bytes
        kept = sum(self.buffers) * own.key_row_bytes if keep_keys else 0
        most: Any = 0
        returning: Any = 0
        casts = [*(0 * rows for rows in self._casts), 0] if keep_keys else [*self._casts, 0]
        most = most + (casts[0] * own.key_row_bytes if self.buffers else 0)  # nothing else is alive at the first cast
        for number, rows in enumerate(self.buffers):
            keys = 0 if keep_keys else rows * own.key_row_bytes
            grads = rows * (own.key_row_bytes + own.wide_key_row_bytes)
            beside = casts[number + 1] * own.key_row_bytes
            most = np.maximum(most, returning + keys + grads + beside)
            returning = grads + (self.received[number] + self.sent[number]) * travels
            most = np.maximum(most, returning)
        sums = self.shared_q * own.query_heads * own.head_dim * own.wide + self.shared_k * own.wide_key_row_bytes
        return kept + most + sums

    @property
    def _casts(self) -> list[Any]:
        """Rows of the messages of each cast: those that are sent and those that arrive, or these and the buffer."""
        parts = zip(self.sent, self.received, self.buffers, strict=True)
        return [np.maximum(sent, buffer) + received for sent, received, buffer in parts]

    @staticmethod
    def _most(held: Sequence[Any], casts: Sequence[Any], keep: bool) -> Any:
        """The most rows at a time: what is held while each cast is under way."""
        most: Any = 0
        kept: Any = 0
        for rows, cast in zip(held, [*casts, 0], strict=True):
            kept = kept + rows if keep else rows
            most = np.maximum(most, kept + cast)
        return most


def exchange_bytes(shape: Shape, own: Shape, position_rows: Any, own_rows: Any) -> Any:
    """q, k, v and out of a rank's heads for all rows of the position, and a message with all heads of its own rows."""
    return position_rows * own.row_bytes + own_rows * shape.row_bytes


def largest_pair(rows: Sequence[Any]) -> Any:
    """The most rows of two stages that follow one another."""
    pairs = [a + b for a, b in itertools.pairwise([*rows, 0])]
    return reduce(np.maximum, pairs) if pairs else 0
