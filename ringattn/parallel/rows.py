"""Rows of tensors on their way: accumulated over calls, cast to the ranks that need them, returned to their owners."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ringattn.kernels.spec import Range, Sum, accumulation_dtype
from ringattn.parallel.plan import Message, Stage
from ringattn.parallel.ranges import overlap
from ringattn.parallel.transport import Pending, Transport


class Accumulator:
    """A result of n rows of which those in `shared` have several parts, added in float32.

    Kernels write every part to `rows` in place. Rows outside `shared` have one part and are final then; `collect` adds
    a part of the others to the wide copy, and `finish` rounds them once. Rows in `untouched` get no part: they are 0.
    """

    def __init__(self, rows: Tensor, shared: Range, untouched: Sequence[Range]) -> None:
        self.rows = rows
        self.shared = shared
        for start, stop in untouched:
            rows[start:stop] = 0
        size = shared[1] - shared[0]
        self.wide = rows.new_zeros(size, *rows.shape[1:], dtype=accumulation_dtype(rows.dtype)) if size else None

    def inside(self, span: Range) -> Range:
        """The shared part of a range (empty: start >= stop)."""
        return overlap(span, self.shared)

    def outside(self, span: Range) -> list[Range]:
        a, b = self.inside(span)
        parts = [(span[0], a), (b, span[1])] if a < b else [span]
        return [part for part in parts if part[0] < part[1]]

    def wide_rows(self, start: int, stop: int) -> Tensor:
        assert self.wide is not None
        return self.wide[start - self.shared[0] : stop - self.shared[0]]

    def sum(self, span: Range) -> Sum | None:
        """Where a kernel that adds leaves its part of the rows `span`, or None if none of them is shared."""
        a, b = self.inside(span)
        return Sum((a - span[0], b - span[0]), self.wide_rows(a, b)) if a < b else None

    def collect(self, span: Range) -> None:
        """Add the part that lies in `rows[span]`."""
        a, b = self.inside(span)
        if a < b:
            self.wide_rows(a, b).add_(self.rows[a:b])

    def add(self, spans: Sequence[Range], parts: Sequence[Tensor]) -> None:
        """Add parts of shared rows that came from elsewhere; the ranges do not overlap."""
        if spans:
            torch._foreach_add_([self.wide_rows(*span) for span in spans], [part.to(self.dtype) for part in parts])

    @property
    def dtype(self) -> torch.dtype:
        """In what parts are added."""
        return accumulation_dtype(self.rows.dtype)

    def sums(self, wide: bool) -> Tensor:
        """All rows, in the dtype of the sums before they are rounded if `wide`, else as the result will be."""
        if self.wide is None or not wide:
            return self.finish().to(self.dtype if wide else self.rows.dtype)
        if self.shared == (0, len(self.rows)):
            return self.wide
        out = self.rows.to(self.dtype)
        out[slice(*self.shared)] = self.wide
        return out

    def finish(self) -> Tensor:
        if self.wide is not None:
            self.rows[slice(*self.shared)] = self.wide
        return self.rows


@dataclass
class KeyCast:
    """The keys and values of a stage under way into its buffers."""

    pending: Pending | None
    buffers: tuple[Tensor, Tensor]
    packed: list[tuple[Message, Tensor, Tensor]]  # messages of several ranges: buffer, what arrived for it

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
            _copy(buffer, [target for _, target in stage.copies], [local[slice(*source)] for source, _ in stage.copies])
        return cls(pending, (buffers[0], buffers[1]), packed)

    def wait(self) -> tuple[Tensor, Tensor]:
        """Keys (rows, K, D) and values (rows, K, V), complete."""
        if self.pending is not None:
            self.pending.wait()
        for message, buffer, staging in self.packed:
            _copy(buffer, message.ranges, _split(staging, message.ranges))
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
        buffers = dkeys.sums(wide), dvalues.sums(wide)
        sends, receives, received = [], [], []
        for buffer in buffers:
            sends += [(message.peer, _gathered(buffer, message.ranges)) for message in stage.receives]
        for message in stage.sends:
            dk, dv = (buffer.new_empty(message.rows, *buffer.shape[1:]) for buffer in buffers)
            received.append((message, dk, dv))
        receives += [(message.peer, dk) for message, dk, _ in received]
        receives += [(message.peer, dv) for message, _, dv in received]
        return cls(_post(transport, sends, receives), stage, buffers, received)

    def wait(self, dk: Accumulator, dv: Accumulator) -> None:
        """Add what belongs to the local rows, in the order of the plan: the same in every run."""
        sources = [source for source, _ in self.stage.copies]
        for grad, buffer in zip((dk, dv), self.buffers, strict=True):
            grad.add(sources, [buffer[slice(*target)] for _, target in self.stage.copies])
        if self.pending is not None:
            self.pending.wait()
        for message, *parts in self.received:
            for grad, part in zip((dk, dv), parts, strict=True):
                grad.add(message.ranges, _split(part, message.ranges))


def _gathered(x: Tensor, ranges: Sequence[Range]) -> Tensor:
    """The rows of `ranges` end to end; one range is a view, unless x is one of some columns."""
    parts = [x[slice(*span)] for span in ranges]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def _split(x: Tensor, ranges: Sequence[Range]) -> Sequence[Tensor]:
    """The inverse of `_gathered`."""
    return x.split([stop - start for start, stop in ranges])


def _copy(buffer: Tensor, targets: Sequence[Range], parts: Sequence[Tensor]) -> None:
    """Many small copies in one launch."""
    if targets:
        torch._foreach_copy_([buffer[slice(*span)] for span in targets], list(parts))


def _post(
    transport: Transport | None, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]]
) -> Pending | None:
    if not sends and not receives:
        return None
    assert transport is not None, "a plan that communicates needs the processes of a SequenceMesh"
    return transport.post(sends, receives)
