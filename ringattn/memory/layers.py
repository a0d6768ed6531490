"""What each layer keeps for its backward pass, and where.

With `keep="layer"` a layer keeps its input and computes all the rest again. With `keep="attention"` it also keeps what
its attention gave, which is no larger than the input and by far the dearest to compute at long lengths; queries, keys
and values are computed again. (The closest designs are prime-rl#3419 and axolotl#3786, which keep it by operator.) Both
may wait in host memory (`ringattn.memory.offload`).

    kept = keep_layers(model.model.layers, "attention")
    ...
    kept.undo()
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from ringattn.memory.offload import Offload
from ringattn.parallel.execution.recall import Recall

Keep = Literal["layer", "attention"]
KEEPS: tuple[Keep, ...] = ("layer", "attention")


class KeptLayer:
    """A layer that keeps little; `undo` gives it back as it was.

    It stands in the layer's place as its forward method, so that names of parameters, hooks of engines and the layer's
    own type stay. Without gradients the layer runs as ever.

    Arguments:
        layer: computes the same when it is called again; draws of random numbers are repeated.
        keep: "layer" or "attention". Attention that is not ringattn's is computed again.
        offload: takes care of what is kept; None: it stays on the device.
        away: whether this layer's share waits on the host. The last layers', whose backward pass begins at once, should
            stay.
    """

    def __init__(self, layer: nn.Module, keep: Keep, offload: Offload | None = None, away: bool = True) -> None:
        if keep not in KEEPS:
            raise ValueError(f"keep must be one of {', '.join(KEEPS)}, got {keep!r}")
        if getattr(layer, "gradient_checkpointing", False):
            raise ValueError(
                f"{type(layer).__name__} checkpoints itself already: call model.gradient_checkpointing_disable() first"
            )
        if isinstance(layer.__dict__.get("forward"), KeptLayer):
            raise ValueError(f"this {type(layer).__name__} keeps what it should already: undo that first")
        self.layer, self.keep, self.offload, self.away = layer, keep, offload, away
        self._plain, self._replaced = layer.forward, layer.__dict__.get("forward")
        layer.forward = self

    def undo(self) -> None:
        """The layer as it was."""
        if self.layer.__dict__.get("forward") is self:
            del self.layer.forward
            if self._replaced is not None:
                self.layer.forward = self._replaced

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._plain(*args, **kwargs)
        with nullcontext() if self.offload is None else self.offload.saving(self.away):
            return checkpoint(self._plain, *args, use_reentrant=False, context_fn=self._contexts(), **kwargs)

    def _contexts(self) -> Any:
        """The function that makes the contexts of both passes."""
        if self.keep == "layer":
            return noop_context_fn
        if self.offload is None:
            return Recall().contexts
        offload, away = self.offload, self.away
        return Recall(lambda x: offload.pack(x, away), offload.unpack).contexts


class KeptLayers:
    """The layers of a model, each a `KeptLayer`."""

    def __init__(self, layers: Sequence[KeptLayer]) -> None:
        self.layers = layers

    def undo(self) -> None:
        """All of them as they were."""
        for layer in self.layers:
            layer.undo()


def keep_layers(
    layers: Sequence[nn.Module] | nn.ModuleList, keep: Keep, offload: Offload | None = None, away: int = 0
) -> KeptLayers:
    """Lets every layer keep little.

    Arguments:
        layers: in the order in which they run.
        keep, offload: see `KeptLayer`.
        away: number of layers, from the first one, whose share waits on the host.

    Raises ValueError for a `keep` that there is not, a number of layers that there are not or an `away` without an
    `offload`; then no layer is changed.
    """
    if not isinstance(away, int) or not 0 <= away <= len(layers):
        raise ValueError(f"away must be a number of the {len(layers)} layers, got {away!r}")
    if away and offload is None:
        raise ValueError(f"away={away} layers need an offload to wait with, got None")
    done: list[KeptLayer] = []
    try:
        for number, layer in enumerate(layers):
            done.append(KeptLayer(layer, keep, offload, number < away))
    except ValueError:
        KeptLayers(done).undo()
        raise
    return KeptLayers(done)
