"""Rows of tensors on their way: accumulated over calls, cast to the ranks that need them, returned to their owners."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ringattn.kernels.reference import accumulation_dtype
from ringattn.kernels.spec import Range
from ringattn.parallel.plan import Message, Stage
from ringattn.parallel.transport import Pending, Transport


class Accumulator:
    """A result of n rows of which those in `shared` have several parts, added in float32.

    Kernels write every part to `rows` in place. Rows outside `shared` have one part and are final then; `collect` adds
    a part of the others to the wide copy, and `finish` rounds them once.
    """

    def __init__(self, rows: Tensor, shared: Range) -> None:
        self.rows = rows
        self.shared = shared
        size = shared[1] - shared[0]
        self.wide = rows.new_zeros(size, *rows.shape[1:], dtype=accumulation_dtype(rows.dtype)) if size else None

    def inside(self, span: Range) -> Range:
        """The shared part of a range (empty: start >= stop)."""
        return max(span[0], self.shared[0]), min(span[1], self.shared[1])

    def outside(self, span: Range) -> list[Range]:
        a, b = self.inside(span)
        parts = [(span[0], a), (b, span[1])] if a < b else [span]
        return [part for part in parts if part[0] < part[1]]

    def wide_rows(self, start: int, stop: int) -> Tensor:
        assert self.wide is not None
        return self.wide[start - self.shared[0] : stop - self.shared[0]]

    def collect(self, span: Range) -> None:
        """Add the part that lies in `rows[span]`."""
        a, b = self.inside(span)
        if a < b:
            self.wide_rows(a, b).add_(self.rows[a:b])

    def add(self, span: Range, part: Tensor) -> None:
        """Add a part of shared rows that came from elsewhere."""
        self.wide_rows(*span).add_(part)

    def widest(self) -> Tensor:
        """All rows in the precision of their sums, if every row is shared; else as the one kernel call wrote them."""
        return self.rows if self.wide is None else self.wide

    def finish(self) -> Tensor:
        if self.wide is not None:
            self.rows[slice(*self.shared)] = self.wide
        return self.rows


@dataclass
class KeyCast:
    """The keys and values of a stage under way into its buffers."""

    pending: Pending | None
    buffers: tuple[Tensor, Tensor]
    packed: list[tuple[Message, Tensor, Tensor]]  # messages of several runs: buffer, what arrived for it

    @classmethod
    def post(cls, stage: Stage, transport: Transport | None, k: Tensor, v: Tensor) -> "KeyCast":
        buffers = tuple(x.new_empty(stage.rows, *x.shape[1:]) for x in (k, v))
        sends, receives, packed = [], [], []
        for local, buffer in zip((k, v), buffers, strict=True):
            sends += [(message.peer, _gathered(local, message.ranges)) for message in stage.sends]
            for message in stage.receives:
                if len(message.ranges) == 1:
                    receives.append((message.peer, buffer[slice(*message.ranges[0])]))
                else:
                    staging = buffer.new_empty(message.rows, *buffer.shape[1:])
                    receives.append((message.peer, staging))
                    packed.append((message, buffer, staging))
        pending = _post(transport, sends, receives)
        for local, buffer in zip((k, v), buffers, strict=True):
            for source, target in stage.copies:
                buffer[slice(*target)] = local[slice(*source)]
        return cls(pending, (buffers[0], buffers[1]), packed)

    def wait(self) -> tuple[Tensor, Tensor]:
        """Keys (rows, K, D) and values (rows, K, V), complete."""
        if self.pending is not None:
            self.pending.wait()
        for message, buffer, staging in self.packed:
            sizes = [stop - start for start, stop in message.ranges]
            for span, part in zip(message.ranges, staging.split(sizes), strict=True):
                buffer[slice(*span)] = part
        return self.buffers


@dataclass
class KeyReduce:
    """The gradients of a stage's buffer rows under way to the owners of the rows."""

    pending: Pending | None
    stage: Stage
    buffers: tuple[Tensor, Tensor]
    received: list[tuple[Message, Tensor, Tensor]]

    @classmethod
    def post(
        cls, stage: Stage, transport: Transport | None, dkeys: Accumulator, dvalues: Accumulator, wide: bool
    ) -> "KeyReduce":
        """Send the rows back the way they came, in float32 if `wide`, else in the dtype of the keys."""
        buffers = tuple(grad.widest() if wide else grad.finish() for grad in (dkeys, dvalues))
        wire = accumulation_dtype(buffers[0].dtype) if wide else buffers[0].dtype
        sends, receives, received = [], [], []
        for buffer in buffers:
            sends += [(message.peer, _gathered(buffer, message.ranges).to(wire)) for message in stage.receives]
        for message in stage.sends:
            dk, dv = (buffer.new_empty(message.rows, *buffer.shape[1:], dtype=wire) for buffer in buffers)
            received.append((message, dk, dv))
        receives += [(message.peer, dk) for message, dk, _ in received]
        receives += [(message.peer, dv) for message, _, dv in received]
        return cls(_post(transport, sends, receives), stage, (buffers[0], buffers[1]), received)

    def wait(self, dk: Accumulator, dv: Accumulator) -> None:
        """Add what belongs to the local rows, in the order of the plan: the same in every run."""
        for grad, buffer in zip((dk, dv), self.buffers, strict=True):
            for source, target in self.stage.copies:
                grad.add(source, buffer[slice(*target)])
        if self.pending is not None:
            self.pending.wait()
        for message, *parts in self.received:
            sizes = [stop - start for start, stop in message.ranges]
            for grad, part in zip((dk, dv), parts, strict=True):
                for span, rows in zip(message.ranges, part.split(sizes), strict=True):
                    grad.add(span, rows)


def _gathered(x: Tensor, ranges: Sequence[Range]) -> Tensor:
    """The rows of `ranges` end to end; one range is a view."""
    parts = [x[slice(*span)] for span in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _post(
    transport: Transport | None, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]]
) -> Pending | None:
    if not sends and not receives:
        return None
    assert transport is not None, "a plan that communicates needs the processes of a SequenceMesh"
    return transport.post(sends, receives)
