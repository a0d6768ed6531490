"""What each layer keeps for its backward pass, and where.

With `keep="layer"` a layer keeps its input and computes all the rest again. With `keep="attention"` it also keeps what
its attention gave, which is no larger than the input and by far the dearest to compute at long lengths; queries, keys
and values are computed again. (The closest designs are prime-rl#3419 and axolotl#3786, which keep it by operator.) With
`keep="selective"` it keeps its narrow matrix products as well (`ringattn.memory.products` says which and why): of a
transformer's layer the first products of the MLP alone are computed twice. All may wait in host memory
(`ringattn.memory.offload`).

    kept = keep_layers(model.model.layers, "attention")
    ...
    kept.undo()

With `every=n` each n-th layer alone keeps its input (`ringattn.memory.every`).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ringattn.memory.every import Again, Chain, Link
from ringattn.memory.modes import Modes
from ringattn.memory.offload import Offload
from ringattn.memory.products import KeptLinears, Products, narrow
from ringattn.memory.tiled_rows import TiledModule
from ringattn.parallel.execution.recall import Recall

Keep = Literal["layer", "attention", "selective"]
KEEPS: tuple[Keep, ...] = ("layer", "attention", "selective")

Region = AbstractContextManager[object]


class KeptLayer:
    """A layer that keeps little; `undo` gives it back as it was.

    It stands in the layer's place as its forward method, so that names of parameters, hooks of engines and the layer's
    own type stay. Without gradients the layer runs as ever.

    Arguments:
        layer: computes the same when it is called again; draws of random numbers are repeated.
        keep: "layer", "attention" or "selective". Attention that is not ringattn's is computed again.
        offload: takes care of what is kept; None: it stays on the device.
        away: whether this layer's share waits on the host. The last layers', whose backward pass begins at once, should
            stay.
        chain: the layers of which the first alone keeps its input, and this layer's place among them; None: it keeps
            its own.
    """

    def __init__(
        self,
        layer: nn.Module,
        keep: Keep,
        offload: Offload | None = None,
        away: bool = True,
        chain: tuple[Chain, int] | None = None,
    ) -> None:
        if keep not in KEEPS:
            raise ValueError(f"keep must be one of {', '.join(KEEPS)}, got {keep!r}")
        _check_no_checkpoint(layer)
        if isinstance(layer.__dict__.get("forward"), KeptLayer):
            raise ValueError(f"this {type(layer).__name__} keeps what it should already: undo that first")
        self.layer, self.keep, self.offload, self.away, self.chain = layer, keep, offload, away, chain
        self._linears = KeptLinears(_outside_of_tiles(narrow(layer), layer)) if keep == "selective" else None
        self._plain, self._replaced = layer.forward, layer.__dict__.get("forward")
        layer.forward = self

    def undo(self) -> None:
        """The layer as it was."""
        if self.layer.__dict__.get("forward") is self:
            del self.layer.forward
            if self._replaced is not None:
                self.layer.forward = self._replaced
            if self._linears is not None:
                self._linears.undo()

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._plain(*args, **kwargs)
        _check_no_checkpoint(self.layer)
        if self._linears is not None:
            products = Products(self._linears, self._pack, self._unpack)
            out = self._checkpointed(self._saving(), self._regions(products), args, kwargs)
            products.end(out)
            return out
        if self.chain is not None:
            return self._in_chain(*self.chain, args, kwargs)
        return self._checkpointed(self._saving(), self._regions(None), args, kwargs)

    def _pack(self, x: Tensor) -> Any:
        return x if self.offload is None else self.offload.pack(x, self.away)

    def _unpack(self, packed: Any) -> Tensor:
        return packed if self.offload is None else self.offload.unpack(packed)

    def _saving(self) -> Region:
        return nullcontext() if self.offload is None else self.offload.saving(self.away)

    def _regions(self, products: Products | None) -> tuple[Region, Region]:
        """The contexts of both passes."""
        if self.keep == "layer":
            return nullcontext(), nullcontext()
        first, second = Recall(self._pack, self._unpack).contexts()
        if products is None:
            return first, second
        return _Both(first, products.noting), _Both(second, products.replaying)

    def _checkpointed(
        self, saving: Region, regions: tuple[Region, Region], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with saving:
            return checkpoint(self._plain, *args, use_reentrant=False, context_fn=lambda: regions, **kwargs)

    def _in_chain(self, chain: Chain, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer, while the chain takes care of its input."""
        if self.offload is not None:
            self.offload.next_layer()
        x, regions = chain.hidden(place, args), self._regions(None)
        version, memory = x._version, (x.data_ptr(), x.shape)  # autograd holds `pack`, so that may not hold x
        again = Again(self.layer, self._plain, args[1:], kwargs, regions[1], Modes(x.device))
        link = Link(chain.enter(place, x, again, self._pack, self._unpack), place)

        def pack(saved: Tensor) -> Any:
            return link if (saved.data_ptr(), saved.shape) == memory else self._pack(saved)

        def unpack(packed: Any) -> Tensor:
            return packed.run.input(packed.place) if isinstance(packed, Link) else self._unpack(packed)

        out = self._checkpointed(saved_tensors_hooks(pack, unpack), regions, args, kwargs)
        chain.leave(place, x, version, out)
        return out


class _Both:
    """Two contexts as one, which may be entered again, as for a graph that is retained."""

    def __init__(self, attention: Region, products: Callable[[], Region]) -> None:
        self._attention, self._products = attention, products

    def __enter__(self) -> None:
        self._stack = ExitStack()
        self._stack.enter_context(self._attention)
        self._stack.enter_context(self._products())

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


def _check_no_checkpoint(layer: nn.Module) -> None:
    if getattr(layer, "gradient_checkpointing", False):
        raise ValueError(
            f"{type(layer).__name__} checkpoints itself already, and what it keeps is decided here: call "
            "model.gradient_checkpointing_disable() (gradient_checkpointing=False in TrainingArguments)"
        )


def _outside_of_tiles(linears: list[nn.Linear], layer: nn.Module) -> list[nn.Linear]:
    tiled = [one for one in layer.modules() if isinstance(one.__dict__.get("forward"), TiledModule)]
    inside = {id(one) for module in tiled for one in module.modules()}
    return [one for one in linears if id(one) not in inside]


class KeptLayers:
    """The layers of a model, each a `KeptLayer`."""

    def __init__(self, layers: Sequence[KeptLayer]) -> None:
        self.layers = layers

    def undo(self) -> None:
        """All of them as they were."""
        for layer in self.layers:
            layer.undo()


def keep_layers(
    layers: Sequence[nn.Module] | nn.ModuleList,
    keep: Keep,
    offload: Offload | None = None,
    away: int = 0,
    every: int = 1,
) -> KeptLayers:
    """Lets every layer keep little.

    Arguments:
        layers: in the order in which they run.
        keep, offload: see `KeptLayer`.
        away: number of layers, from the first one, whose share waits on the host.
        every: layers from one whose input is kept to the next; those between are computed once more than others. With
            `keep` "layer" or "attention".

    Raises ValueError for a `keep` that there is not, a number of layers that there are not, an `away` without an
    `offload` or an `every` that does not go with `keep`; NotImplementedError for layers that cannot be computed from
    one before them. Then no layer is changed.
    """
    if not isinstance(away, int) or not 0 <= away <= len(layers):
        raise ValueError(f"away must be a number of the {len(layers)} layers, got {away!r}")
    if away and offload is None:
        raise ValueError(f"away={away} layers need an offload to wait with, got None")
    chains = _chains(list(layers), keep, every)
    done: list[KeptLayer] = []
    try:
        for number, layer in enumerate(layers):
            chain = (chains[number // every], number % every) if chains else None
            done.append(KeptLayer(layer, keep, offload, number < away, chain))
    except ValueError:
        KeptLayers(done).undo()
        raise
    return KeptLayers(done)


def _chains(layers: list[nn.Module], keep: Keep, every: int) -> list[Chain]:
    """Each `every` layers as a chain, the last ones perhaps fewer; none if each layer keeps its own input."""
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every must be a number of layers >= 1, got {every!r}")
    if every == 1:
        return []
    if keep == "selective":
        raise ValueError(f'every={every} needs keep="layer" or "attention", got keep={keep!r}')
    return [Chain(layers[first : first + every], first, every) for first in range(0, len(layers), every)]
