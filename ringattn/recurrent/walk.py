"""States walk through the pieces of cut documents as affine maps, by the rounds of a plan, on any side of a document.

Legend: H value heads, D key dim, V value dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ringattn.recurrent.kernels.contract import apply_map, compose
from ringattn.recurrent.rounds import Round, Take
from ringattn.recurrent.wire import Arriving, Here, Wire


@dataclass(frozen=True)
class Shapes:
    """Of one piece's map (H,), (H, D) or (H, D, D), and of its state (H, D, V), with what holds them."""

    map: torch.Size
    state: torch.Size
    like: Tensor  # an empty tensor of their dtype and device


class Walk:
    """One walk: its first round leaves when it is made, and what follows waits for it.

    Arguments:
        rounds: of the plan.
        wire: None where all pieces are on this rank.
        shapes: of what arrives.
        maps, states: M and U of this rank's cut pieces, in their order; None for those that the plan asks none of.
    """

    def __init__(
        self,
        rounds: Sequence[Round],
        wire: Wire | None,
        shapes: Shapes,
        maps: Sequence[Tensor | None],
        states: Sequence[Tensor | None],
    ) -> None:
        self.rounds, self.wire, self.shapes = rounds, wire, shapes
        self.maps, self.states = list(maps), list(states)
        self._under_way = self._sent(rounds[0])

    def finish(self) -> list[Tensor | None]:
        """What every cut piece of this rank finds at its head; None where its document begins. Collective."""
        for number, one in enumerate(self.rounds[:-1]):
            self._grow(one)
            self._under_way = self._sent(self.rounds[number + 1])
        arrived_maps, arrived = self._arrived(self.rounds[-1])
        found: list[Tensor | None] = [None] * len(self.states)
        for step in self.rounds[-1].steps:  # from the head of the document on
            values = torch.stack([arrived[take.state] for take in step])
            if step[0].map is not None:
                values = apply_map(_stacked(arrived_maps, _mapped(step)), _stacked(found, _pieces(step))) + values
            _put(found, _pieces(step), values)
        return found

    def _grow(self, one: Round) -> None:
        """Every piece composes what it holds with what arrives, nearest first."""
        arrived_maps, arrived = self._arrived(one)
        for step in one.steps:
            held = _stacked(self.maps, _pieces(step))
            values = apply_map(held, _stacked(arrived, [take.state for take in step]))
            _put(self.states, _pieces(step), values + _stacked(self.states, _pieces(step)))
            matrices = [take for take in step if take.map is not None]
            if matrices:
                held = _stacked(self.maps, _pieces(matrices))
                _put(self.maps, _pieces(matrices), compose(held, _stacked(arrived_maps, _mapped(matrices))))

    def _sent(self, one: Round) -> Arriving:
        maps, states = self.shapes.map.numel(), self.shapes.state.numel()
        parts = [
            part.flatten()
            for parcel in one.sends
            for held, pieces in ((self.maps, parcel.maps), (self.states, parcel.states))
            for part in _held(held, pieces)
        ]
        send = torch.cat([self.shapes.like.flatten(), *parts])
        if self.wire is None:
            return Here(send)
        sends, receives = (
            [len(parcel.maps) * maps + len(parcel.states) * states for parcel in parcels]
            for parcels in (one.sends, one.receives)
        )
        return self.wire.start(send, sends, receives)

    def _arrived(self, one: Round) -> tuple[list[Tensor], list[Tensor]]:
        """Maps and states as they are numbered: views of what arrived."""
        rows = self._under_way.wait()
        sizes = [
            [self.shapes.map.numel()] * len(parcel.maps) + [self.shapes.state.numel()] * len(parcel.states)
            for parcel in one.receives
        ]
        parts = iter(rows.split([*chain(*sizes)]) if any(sizes) else ())
        maps: list[Tensor] = []
        states: list[Tensor] = []
        for parcel in one.receives:
            maps += [next(parts).view(self.shapes.map) for _ in parcel.maps]
            states += [next(parts).view(self.shapes.state) for _ in parcel.states]
        return maps, states


def _pieces(step: Sequence[Take]) -> list[int]:
    return [take.piece for take in step]


def _mapped(step: Sequence[Take]) -> list[int]:
    return [take.map for take in step if take.map is not None]


def _held(values: Sequence[Tensor | None], numbers: Sequence[int]) -> list[Tensor]:
    found = [values[number] for number in numbers]
    assert all(one is not None for one in found), "a plan asks for what a piece does not hold"
    return found  # type: ignore[return-value]


def _stacked(values: Sequence[Tensor | None], numbers: Sequence[int]) -> Tensor:
    return torch.stack(_held(values, numbers))


def _put(values: list[Tensor | None], numbers: Sequence[int], found: Tensor) -> None:
    for number, one in zip(numbers, found.unbind(), strict=True):
        values[number] = one
