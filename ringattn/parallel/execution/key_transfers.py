"""Rows of keys on their way: cast to the ranks that need them, and their gradients returned to the owners."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringattn.kept import kept
from ringattn.kernels.movement.additions import Addition, Additions, Pair
from ringattn.kernels.movement.heads import head_columns
from ringattn.kernels.movement.rows import add_rows, flat_pair, row_index, take_rows
from ringattn.kernels.spec import Range, to_device
from ringattn.parallel.execution.accumulator import Accumulator
from ringattn.parallel.geometry.ranges import overlap
from ringattn.parallel.plan.plan import Stage
from ringattn.parallel.transport.protocol import Pending, Transport
from ringattn.whereabouts import comes_to


class _Moves:
    """Which rows of a stage go where: index tables for `take_rows` and `add_rows`. Kept with the stage."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._sent = [span for message in stage.sends for span in message.ranges]
        self._returned = [span for message in stage.receives for span in message.ranges]
        self._parts = [Addition(source, target[0], False) for source, target in stage.copies]
        self._parts += [Addition(span, place, True) for span, place in _end_to_end(self._sent)]

    @classmethod
    def of(cls, stage: Stage) -> "_Moves":
        return kept(stage, "moves", lambda: cls(stage))

    def sent(self, device: torch.device) -> Tensor:
        """Local rows in the order of the cast's messages."""
        return self._index("sent", self._sent, device)

    def buffer(self, device: torch.device) -> Tensor:
        """Where every row of the buffer comes from: rows that arrive, then local rows."""
        return kept(self, ("buffer", device), lambda: to_device(torch.from_numpy(self._sources()), device))

    def _sources(self) -> "np.ndarray[Any, np.dtype[np.int32]]":
        stage, sources = self._stage, np.empty(self._stage.rows, dtype=np.int32)
        for (start, stop), target in stage.copies:
            sources[slice(*target)] = np.arange(start, stop) + stage.cast.received
        for target, place in _end_to_end(self._returned):
            sources[slice(*target)] = np.arange(place, place + target[1] - target[0])
        for source, target in stage.repeats:
            sources[slice(*target)] = sources[slice(*source)]
        return sources

    def returned(self, device: torch.device) -> Tensor:
        """Rows of the buffer in the order in which their gradients go back."""
        return self._index("returned", self._returned, device)

    @cached_property
    def returned_sums(self) -> Additions:
        """Rows of the message in which gradients go back, and those of the buffer that are added there: of tokens that
        stand in it more than once."""
        places = sorted((span, place) for span, place in _end_to_end(self._returned))
        begins = [start for (start, _), _ in places]
        parts = [Addition((place, place + stop - start), start, False) for (start, stop), place in places]
        for source, target in self._stage.repeats:
            span, place = places[bisect_right(begins, source[0]) - 1]
            assert overlap(span, source) == source, "a repeat is of rows that arrived together"
            at = place + source[0] - span[0]
            parts.append(Addition((at, at + source[1] - source[0]), target[0], False))
        return Additions(tuple(parts))

    def additions(self, base: int) -> Additions:
        """To which local rows, counted from `base`, gradients are added: first those of copies, then by rank."""

        def make() -> Additions:
            moved = [part._replace(target=(part.target[0] - base, part.target[1] - base)) for part in self._parts]
            return Additions(tuple(moved))

        return kept(self, ("additions", base), make)

    def _index(self, name: str, ranges: list[Range], device: torch.device) -> Tensor:
        return kept(self, (name, device), lambda: to_device(torch.from_numpy(row_index(ranges)), device))


def make_tables(stage: Stage, bases: Iterable[int], device: torch.device) -> None:
    """Put the tables of a stage's transfers on `device`, for local sums that begin with one of the rows `bases`."""
    moves = _Moves.of(stage)
    moves.sent(device)
    moves.buffer(device)
    if stage.repeats:
        moves.returned_sums.tables(device)
    else:
        moves.returned(device)
    for base in bases:
        moves.additions(base).tables(device)


def _pack_returning(stage: Stage, message: Tensor, grads: Pair) -> None:
    """Fill a message with the gradients of the rows that go back."""
    moves = _Moves.of(stage)
    if stage.repeats:
        columns = grads[0].shape[1]
        add_rows(moves.returned_sums, None, grads, (message[:, :columns], message[:, columns:]), fresh=True)
    else:
        take_rows(moves.returned(message.device), message, None, grads)


def _end_to_end(ranges: Sequence[Range]) -> Iterator[tuple[Range, int]]:
    """Each range and the place of its first row where all of them lie end to end."""
    place = 0
    for start, stop in ranges:
        yield (start, stop), place
        place += stop - start


@dataclass
class KeyCast:
    """The keys and values of a stage under way into its buffer."""

    stage: Stage
    local: tuple[Tensor, Tensor]  # (n, K, D), (n, K, V)
    receive: Tensor  # (rows that arrive, K * (D + V))
    pending: Pending | None

    @classmethod
    def post(cls, stage: Stage, transport: Transport | None, k: Tensor, v: Tensor) -> "KeyCast":
        width = k.shape[1] * (k.shape[2] + v.shape[2])
        route = stage.cast.times(width)
        receive = k.new_empty(stage.cast.received, width)
        pending = None
        if route.most and width:
            assert transport is not None, "a plan that communicates needs the processes of a SequenceMesh"
            send = transport.buffer(route, k)
            take_rows(_Moves.of(stage).sent(k.device), send.view(-1, width), None, flat_pair(k, v))
            pending = transport.exchange(send, receive.view(-1), route)
        return cls(stage, (k, v), receive, pending)

    def wait(self) -> tuple[Tensor, Tensor]:
        """Keys (rows, K, D) and values (rows, K, V), complete: columns of one buffer."""
        comes_to("keys")
        if self.pending is not None:
            self.pending.wait()
        k, v = self.local
        buffer = k.new_empty(self.stage.rows, self.receive.shape[1])
        take_rows(_Moves.of(self.stage).buffer(k.device), buffer, self.receive, flat_pair(k, v))
        self.receive = buffer  # what arrived is not needed any more
        keys, values = head_columns(buffer, (k.shape[1], v.shape[1]), (k.shape[2], v.shape[2]))
        return keys, values


@dataclass
class KeyReduce:
    """The gradients of a stage's buffer rows under way to the owners of the rows."""

    stage: Stage
    grads: tuple[Tensor, Tensor]
    receive: Tensor  # (rows that come back, K * (D + V))
    pending: Pending | None

    @classmethod
    def post(
        cls, stage: Stage, transport: Transport | None, dkeys: Accumulator, dvalues: Accumulator, wide: bool
    ) -> "KeyReduce":
        """Send the rows back the way they came, in float32 if `wide`, else in the dtype of the keys."""
        grads = flat_pair(dkeys.total, dvalues.total)
        width = grads[0].shape[1] + grads[1].shape[1]
        route = stage.back.times(width)
        receive = grads[0].new_empty(stage.back.received, width, dtype=dkeys.dtype if wide else dkeys.rows.dtype)
        pending = None
        if route.most and width:
            assert transport is not None, "a plan that communicates needs the processes of a SequenceMesh"
            send = transport.buffer(route, receive)
            _pack_returning(stage, send.view(-1, width), grads)
            pending = transport.exchange(send, receive.view(-1), route)
        return cls(stage, grads, receive, pending)

    def wait(self, dk: Accumulator, dv: Accumulator) -> None:
        """Add what belongs to the local rows, in the order of the plan: the same in every run."""
        comes_to("gradients of keys")
        if self.pending is not None:
            self.pending.wait()
        (keys, first), (values, _) = dk.home, dv.home
        add_rows(_Moves.of(self.stage).additions(first), self.receive, self.grads, flat_pair(keys, values), dk.fresh)
