"""Layers of which each n-th alone keeps its input: those of the layers between are computed again from it.

When the backward pass comes to a chain of n layers, the layers before the last run once more without gradients, and the
inputs that they make are held until each has been used. So a chain takes the memory of n inputs while it goes backward
and of one input until then, and all but its last layer run three times. (Chen et al., arXiv 1604.06174, keep every n-th
too, and hold all that is inside of n layers meanwhile: for a transformer ten inputs' worth a layer.)

That holds for layers that hand one tensor to each other and nothing between them changes it: it is looked after, and
refused by name where it is not so.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from ringattn.memory.modes import Modes
from ringattn.memory.offload import view_of

Pack = Callable[[Tensor], Any]
Unpack = Callable[[Any], Tensor]


class Chain:
    """Layers that run one after another.

    Arguments:
        layers: at least one.
        first: number of the first of them in the model, for messages.
        every: as the user said it.
    """

    def __init__(self, layers: list[nn.Module], first: int, every: int) -> None:
        for number, layer in enumerate(layers):
            if any(hasattr(parameter, "ds_id") for parameter in layer.parameters(recurse=False)):
                raise NotImplementedError(
                    f"every={every}: layer {first + number} ({type(layer).__name__}) has parameters of its own, and "
                    "DeepSpeed's ZeRO-3 gathers those only for the layer's own call: use every=1"
                )
        self.layers, self.first, self.every = layers, first, every
        self._run: Run | None = None  # the forward pass that is under way

    def hidden(self, place: int, args: tuple[Any, ...]) -> Tensor:
        """The hidden states among what a layer is given. Raises NotImplementedError if they are not the first of it."""
        if not args or not isinstance(args[0], Tensor):
            raise self._refused(place, "is not given its hidden states as its first argument, without a name")
        return args[0]

    def enter(self, place: int, x: Tensor, again: "Again", pack: Pack, unpack: Unpack) -> "Run":
        """A layer begins.

        Arguments:
            place: of the layer in the chain.
            x: its input.
            again: computes the layer's output again.
            pack, unpack: what stands for the first input until the backward pass, and the tensor again.

        Raises NotImplementedError if its input is not what the layer before returned.
        """
        if place == 0:
            self._run = Run(pack(x), unpack)
        run = self._run
        if run is None or (place > 0 and (run.output is None or not run.output.is_still(x))):
            self._run = None
            raise self._refused(place, "gets other hidden states than the layer before it has returned")
        run.again.append(again)
        return run

    def leave(self, place: int, x: Tensor, version: int, out: Any) -> None:
        """A layer is over: it got `x` in this version and returned `out`."""
        run = self._run
        assert run is not None
        if x._version != version:
            raise self._refused(place, "changes its input in place")
        hidden = _hidden(out)
        run.output = None if hidden is None else _Seen(hidden)
        if place == len(self.layers) - 1:
            self._run = None  # from here on the graph alone holds it

    def _refused(self, place: int, why: str) -> NotImplementedError:
        return NotImplementedError(
            f"every={self.every}: layer {self.first + place} ({type(self.layers[place]).__name__}) {why}, so that what "
            "goes into it cannot be computed again from the input of a layer before it: use every=1"
        )


class Again(NamedTuple):
    """A layer that can be run again as it was run.

    Arguments:
        layer, forward: the module, whose weights may have to be gathered, and what it computes.
        args, kwargs: without the hidden states, which come first.
        region: a context in which it takes what it has kept.
    """

    layer: nn.Module
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    region: AbstractContextManager[object]
    modes: Modes

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad(), _gathered(self.layer), self.modes.again(), self.region:
            hidden = _hidden(self.forward(x, *self.args, **self.kwargs))
        assert hidden is not None
        return hidden


class Run:
    """One forward pass through a chain: the input of its first layer, and those of the others when they are needed."""

    def __init__(self, first: Any, unpack: Unpack) -> None:
        self.output: _Seen | None = None
        self.again: list[Again] = []
        self._first, self._unpack = first, unpack
        self._inputs: dict[int, Tensor] = {}

    def input(self, place: int) -> Tensor:
        """What the layer at a place of the chain was given; it is held for the layers before it, and no longer here."""
        if place not in self._inputs:
            x = self._inputs[0] = self._unpack(self._first)
            for number in range(place):
                x = self._inputs[number + 1] = self.again[number](x)
        return self._inputs.pop(place)


class Link(NamedTuple):
    """What stands for the input of a layer of a chain in autograd's graph."""

    run: Run
    place: int


class _Seen:
    """A tensor that may be gone, to be known again."""

    def __init__(self, x: Tensor) -> None:
        self._storage, self._view = StorageWeakRef(x.untyped_storage()), view_of(x)

    def is_still(self, x: Tensor) -> bool:
        """Whether it is this one, with the same values."""
        same = self._storage.cdata == x.untyped_storage()._cdata and not self._storage.expired()
        return same and self._view == view_of(x)


def _hidden(out: Any) -> Tensor | None:
    """The hidden states that a layer returns, alone or first of several."""
    first = out[0] if isinstance(out, tuple) and out else out
    return first if isinstance(first, Tensor) else None


@contextmanager
def _gathered(layer: nn.Module) -> Iterator[None]:
    """A layer's weights are whole: FSDP2's own hooks gather them for calls of the model and the backward pass alone.
    DeepSpeed's hooks stand on the modules inside."""
    if not isinstance(layer, FSDPModule) or not any(isinstance(one, DTensor) for one in layer.parameters()):
        yield
        return
    layer.unshard()
    try:
        yield
    finally:
        layer.reshard()
