"""Settings of memory put into a transformers model: tiled head, tiled MLPs, layers that keep little."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ringattn.hf.disguised import LossAsLogits
from ringattn.hf.empty import Placeholder, layout_of
from ringattn.hf.head import TiledHead
from ringattn.hf.layers import decoder_layers, tileable_mlps
from ringattn.hf.loss import GlobalLoss
from ringattn.kept import keep, kept_already
from ringattn.memory.layers import keep_layers
from ringattn.memory.offload import Offload
from ringattn.memory.settings import MemorySettings
from ringattn.memory.tiled_rows import TiledModule
from ringattn.parallel.layout import Layout
from ringattn.trees import Targets

_KEY = "targets of this rank"


def note_targets(layout: Layout, targets: int | Targets) -> None:
    """Keep with its layout what the host knows of this rank's targets, which a tiled loss then need not ask the device.

    Arguments:
        targets: how many there are among the `shift_labels` that will go into the model; -100 is none. Or triples,
            which are then taken in the place of `shift_labels`.
    """
    keep(layout, _KEY, targets)


def noted_triples(layout: Layout) -> Targets | None:
    """This rank's triples, if that is what its targets are."""
    noted = kept_already(layout, _KEY)
    return noted if isinstance(noted, Targets) else None


class ModelMemory:
    """What a model does about memory from now on; `undo` gives it back as it was.

    Arguments:
        model: a transformers model, which may be on the meta device.
        settings: what to put in; the default of each field changes nothing.
        device: where it will compute.

    Raises ValueError or NotImplementedError naming the setting that does not fit the model, MemoryError for more host
    memory than there is; then the model is as it was.
    """

    def __init__(self, model: nn.Module, settings: MemorySettings, device: torch.device) -> None:
        self.settings = settings
        self.head: TiledHead | None = None
        self.wants_logprobs = False  # of the next forward pass, in the place of logits
        self.mlps: list[TiledModule] = []
        self.offload: Offload | None = None
        self._undo: list[Callable[[], None]] = []
        try:
            self._put_in(model, device)
        except BaseException:
            self.undo()
            raise

    def _put_in(self, model: nn.Module, device: torch.device) -> None:
        settings = self.settings
        if settings.loss_tile is not None:
            self.head = TiledHead(model, settings.loss_tile)
            self._undo.append(self.head.undo)
        if settings.mlp_tile is not None:
            for mlp in tileable_mlps(model):
                self.mlps.append(TiledModule(mlp, settings.mlp_tile))
                self._undo.append(self.mlps[-1].undo)
        if settings.keep == "all":
            return
        layers = decoder_layers(model)
        if settings.host_layers > len(layers):
            raise ValueError(
                f"host_layers must be at most the {len(layers)} layers of {type(model).__name__}, got "
                f"{settings.host_layers}"
            )
        if settings.host_layers:
            self.offload = Offload(device, settings.host_bytes)
            self._undo.append(self.offload.close)
        kept = keep_layers(layers, settings.keep, self.offload, settings.host_layers, settings.every)
        self._undo.append(kept.undo)

    def expect(self, kwargs: dict[str, Any], loss: GlobalLoss) -> None:
        """A forward pass with these keywords begins. Collective over replicas if it has labels and a tiled loss."""
        if self.head is None:
            return
        self.head.forget()
        told = kwargs["cu_seq_lens_q"]
        triples = noted_triples(layout_of(told))
        if triples is not None and isinstance(told, Placeholder):
            triples = triples.of_tokens(1)  # none of which is of the row that an empty rank was given
        if self.wants_logprobs:
            assert triples is not None
            self.head.announce_logprobs(triples)
        elif kwargs.get("labels") is not None:
            scale = loss.count(kwargs).double().reciprocal()
            if triples is not None:
                self.head.announce(triples, scale)
            else:
                self.head.announce(kwargs["shift_labels"], scale, kept_already(layout_of(told), _KEY))

    def undo(self) -> None:
        """The model as it was. Without effect the second time."""
        while self._undo:
            self._undo.pop()()


def without_logits(output: Any) -> Any:
    """A model's output without the loss that stood for its logits: there are no logits to look at. Log-probabilities
    that were asked for stay there, as they are."""
    if isinstance(output, tuple):
        plain = (one.loss() if isinstance(one, LossAsLogits) and not one.is_loss else one for one in output)
        return tuple(one for one in plain if not isinstance(one, LossAsLogits))
    if isinstance(logits := getattr(output, "logits", None), LossAsLogits):
        output["logits"] = None if logits.is_loss else logits.loss()
    return output
