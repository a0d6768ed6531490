"""The layers of a model one after another: what they keep, where it is, and when it comes back."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from ringattn.memory.offload import ALIGNMENT, IN_FLIGHT, LEAST
from ringattn.memory.planning.layer import Layer
from ringattn.memory.settings import MemorySettings


@dataclass(frozen=True)
class Layers:
    """All layers."""

    layers: tuple[Layer, ...]

    def __getitem__(self, number: int) -> Layer:
        return self.layers[number]

    @property
    def count(self) -> int:
        return len(self.layers)

    @property
    def stream(self) -> int:
        """Bytes of a hidden state."""
        return self.layers[0].stream

    @property
    def away(self) -> int:
        """Layers, from the first one, whose share is on the host."""
        return min(self._memory.host_layers, self.count)

    @cached_property
    def ends(self) -> frozenset[int]:
        """The first and the last layer of every kind."""
        kinds = [(layer.parts, layer.weights.count) for layer in self.layers]
        last = {kind: number for number, kind in enumerate(kinds)}
        return frozenset({*last.values(), *map(kinds.index, last)})

    @property
    def host_bytes(self) -> int:
        """Pinned memory for what they keep, each tensor from where the stack of it aligns."""
        return sum(
            -(-size // ALIGNMENT) * ALIGNMENT
            for number in range(self.away)
            for size in self._tensors(number)
            if size >= LEAST
        )

    def kept(self, first: int) -> int:
        """Bytes on the device of what the first layers keep."""
        return self._kept[first]

    @cached_property
    def _kept(self) -> list[int]:
        sizes = (
            sum(size for size in self._tensors(number) if number >= self.away or size < LEAST)
            for number in range(self.count)
        )
        return [0, *accumulate(sizes)]

    def in_flight(self, number: int) -> int:
        """Bytes on the device of what came back from the host while a layer goes backward: its own, what its chain
        begins with, and what the nearest layer before it that keeps anything does."""
        if number >= self.away:
            return self._before(number) if 0 < number == self.away else 0
        begin = number - number % self._memory.every
        own = self._large(number)
        own += sum(self._tensors(begin)[:1]) if begin < number else 0
        # In a chain that keeps one input alone the next to come is that of the chain before.
        return own + self._before(number if self._large(number) else begin)

    def _before(self, number: int) -> int:
        """Of the nearest layer before one that keeps any."""
        return next((size for one in range(number - 1, -1, -1) if (size := self._large(one))), 0)

    def _large(self, number: int) -> int:
        """Bytes of what a layer keeps and may send away."""
        return sum(size for size in self._tensors(number) if size >= LEAST)

    def leaving(self, number: int, attended: bool) -> int:
        """Bytes of the last tensors on their way to the host while a layer is computed forward, without its own input
        and the model's. Nobody frees those of the last layer that goes there before the backward pass.

        Arguments:
            attended: the layer's attention is over.
        """
        sent = [
            (layer, place, size)
            for layer in range(max(0, min(number, self.away - 1) - IN_FLIGHT), min(number + 1, self.away))
            for place, size in enumerate(self._tensors(layer))
            if size >= LEAST and (attended or layer < number or not place)
        ]
        return sum(
            size
            for layer, place, size in sent[len(sent) - min(IN_FLIGHT, len(sent)) :]
            if place or layer not in (0, number)
        )

    def between(self, number: int) -> int:
        """Inputs of the layers of a chain that were computed again, and are there while a layer goes backward."""
        every = self._memory.every
        return (number % every) * self.stream

    def _tensors(self, number: int) -> tuple[int, ...]:
        every = self._memory.every
        return self[number].tensors if number % every == 0 else self[number].tensors[1:]

    @property
    def _memory(self) -> MemorySettings:
        return self.layers[0].memory
