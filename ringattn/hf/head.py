"""A Hugging Face model's head and loss in tiles of tokens, for any family whose head is a linear layer.

Between head and loss families do different things to their logits: Gemma divides, takes a tanh and multiplies, Cohere
and Granite scale. What a model does is asked of its own code, once and before training: its forward pass runs with an
empty decoder and a head that returns a tensor which notes what is done to it. From then on the head, when targets are
announced, returns the loss in the disguise of logits (`LossAsLogits`). That lets the same things be done to it, in the
same order, and nothing else: they have been done already, tile by tile.

The loss is made inside of the head's forward pass, since that is where FSDP and ZeRO hold its weight whole: it is
gathered once, and its gradient is reduced once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ringattn.hf.disguised import LossAsLogits, NotedLogits, Step
from ringattn.hf.layers import decoder_layers
from ringattn.memory.tiled_logprobs import tiled_logprobs
from ringattn.memory.tiled_loss import TILE, tiled_loss
from ringattn.trees import Targets


class TiledHead:
    """The head of a model, which from now on makes the loss of announced targets in tiles; `undo` gives it back.

    Arguments:
        model: a Hugging Face model with a loss; it may be on the meta device. Its head must be an `nn.Linear`.
        tile: tokens of a tile.

    Raises NotImplementedError for a head or a model that it cannot do exactly, ValueError for a tile below 1.
    """

    def __init__(self, model: nn.Module, tile: int = TILE) -> None:
        if not isinstance(tile, int) or isinstance(tile, bool) or tile < 1:
            raise ValueError(f"tile must be a number of tokens >= 1, got {tile!r}")
        self.head, self.tile = _linear_head(model), tile
        self.steps = steps_after_head(model, self.head)
        self._announced: Callable[[Tensor], Tensor] | None = None
        self._plain = self.head.forward
        self.head.forward = self  # type: ignore[method-assign]

    def announce(self, targets: Tensor | Targets, scale: float | Tensor, count: int | None = None) -> None:
        """The next forward pass is of these targets: any shape, one for each token, -100 for none; or triples.

        Arguments:
            scale: what the sum of their losses is multiplied with.
            count: how many they are, if the host knows: then it need not wait for the device.
        """
        given = targets if isinstance(targets, Targets) else targets.flatten()

        def loss(hidden: Tensor) -> Tensor:
            return tiled_loss(
                hidden, self.head.weight, given, **self._options, scale=scale, tile=self.tile, count=count
            )

        self._announced = self._of(len(given) if isinstance(given, Tensor) else given.tokens, loss)

    def announce_logprobs(self, targets: Targets) -> None:
        """The next forward pass is of the log-probabilities of these triples; they come in the disguise of logits."""

        def log_probs(hidden: Tensor) -> Tensor:
            return tiled_logprobs(hidden, self.head.weight, targets, **self._options, tile=self.tile)

        self._announced = self._of(targets.tokens, log_probs)

    def forget(self) -> None:
        """The next forward pass is of no targets, unless some are announced: one that failed may have left its own."""
        self._announced = None

    @torch.compiler.disable
    def __call__(self, hidden: Tensor) -> Tensor:
        if self._announced is None:
            return self._plain(hidden)
        announced, self._announced = self._announced, None
        return announced(hidden)

    def _of(self, tokens: int, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """From a function of hidden states (t, E) to the head's of (1, t, E), whose result stands for logits."""

        def disguised(hidden: Tensor) -> Tensor:
            if tokens != hidden.shape[:-1].numel():
                raise ValueError(
                    f"the head was given {hidden.shape[:-1].numel()} tokens and {tokens} targets: with a tiled "
                    "loss logits_to_keep must be left out"
                )
            shape = torch.Size((*hidden.shape[:-1], self.head.out_features))
            return LossAsLogits.of(function(hidden.flatten(0, -2)), shape, self.steps)

        return disguised

    @property
    def _options(self) -> dict[str, Any]:
        return {"bias": self.head.bias, "transform": self._transform if self.steps else None}

    def undo(self) -> None:
        """The head as it was."""
        if self.head.__dict__.get("forward") is self:
            del self.head.forward

    def _transform(self, logits: Tensor) -> Tensor:
        for step in self.steps:
            logits = step.on(logits)
        return logits


def steps_after_head(model: nn.Module, head: nn.Linear) -> tuple[Step, ...]:
    """What a model does to its logits before its loss, asked of its own code. No weight is read.

    Raises NotImplementedError for anything that cannot be done to each tile by itself.
    """
    found: list[NotedLogits] = []

    def note(hidden: Tensor) -> NotedLogits:
        found.append(NotedLogits.of(torch.Size((*hidden.shape[:-1], head.out_features))))
        return found[0]

    def stop(logits: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if len(found) != 1 or logits is not found[0]:
            raise NotImplementedError(f"the loss of {type(model).__name__} is not made of what its head returns")
        raise _Noted

    ids = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
    try:
        with _instead(model, head, note, stop), torch.no_grad():
            type(model).forward(model, input_ids=ids, labels=ids, use_cache=False)
    except _Noted:
        return tuple(found[0].steps)
    except NotImplementedError as error:
        raise NotImplementedError(f"{type(model).__name__} cannot have a tiled loss: {error}") from None
    except Exception as error:
        raise NotImplementedError(
            f"{type(model).__name__} cannot have a tiled loss: what it does to its logits could not be seen "
            f"({type(error).__name__}: {error})"
        ) from error
    raise NotImplementedError(f"{type(model).__name__} cannot have a tiled loss: it calls no loss_function with logits")


class _Noted(Exception):
    """The loss was reached."""


class _Stub(nn.Module):
    """Stands for a decoder: returns one hidden state whatever it is given. Attributes are the decoder's.

    A part of it that holds the layers is such a stub as well: some families call that one (OPT).
    """

    def __init__(self, hidden: Tensor, decoder: nn.Module, layers: nn.Module) -> None:
        super().__init__()
        self.__dict__["_stands_for"] = hidden, decoder, layers

    def __getattr__(self, name: str) -> Any:
        hidden, decoder, layers = self.__dict__["_stands_for"]
        found = getattr(decoder, name)
        if isinstance(found, nn.Module) and found is not layers and any(one is layers for one in found.modules()):
            return _Stub(hidden, found, layers)
        return found

    def forward(self, *args: Any, **kwargs: Any) -> "_Outputs":
        return _Outputs(self.__dict__["_stands_for"][0])


class _NotingHead(nn.Module):
    """Stands for a head, whose attributes it has: the head's own call may have hooks of an engine."""

    def __init__(self, head: nn.Linear, note: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.__dict__["_stands_for"] = head, note

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_stands_for"][0], name)

    def forward(self, hidden: Tensor) -> Tensor:
        noted: Tensor = self.__dict__["_stands_for"][1](hidden)
        return noted


class _Outputs:
    """A decoder's outputs, of which only the last hidden state is there."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, key: Any) -> Any:
        return self.last_hidden_state if key in (0, "last_hidden_state") else None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def get(self, name: str, default: Any = None) -> Any:
        return default


@contextmanager
def _instead(model: Any, head: nn.Linear, note: Callable[..., Any], stop: Callable[..., Any]) -> Iterator[None]:
    """The model with an empty decoder, a head that notes, and a loss function that stops."""
    layers = decoder_layers(model)
    beside = (
        (name, child)
        for name, child in model.named_children()
        if any(module is layers for module in child.modules()) and not any(module is head for module in child.modules())
    )
    prefix, decoder = next(beside, (None, None))
    if decoder is None:
        raise NotImplementedError("its decoder does not stand beside its head")
    hidden = torch.zeros(1, 2, head.in_features, dtype=head.weight.dtype, device=head.weight.device)
    before = model.__dict__.get("_loss_function", _NONE)
    places = [(part, name) for part in model.modules() for name, child in part._modules.items() if child is head]
    model._modules[prefix], model._loss_function = _Stub(hidden, decoder, layers), stop
    for part, name in places:
        part._modules[name] = _NotingHead(head, note)
    try:
        yield
    finally:
        model._modules[prefix] = decoder
        for part, name in places:
            part._modules[name] = head
        if before is _NONE:
            del model._loss_function
        else:
            model._loss_function = before


_NONE = object()


def _linear_head(model: Any) -> nn.Linear:
    """The head; raises NotImplementedError naming what it is instead of a plain linear layer."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is not nn.Linear:
        adapter = "an adapter, " if hasattr(head, "base_layer") else ""  # PEFT's layers have the names of torch's
        told = "no head" if head is None else f"{adapter}a {type(head).__name__} as its head"
        raise NotImplementedError(f"{type(model).__name__} has {told}: a tiled loss needs an nn.Linear")
    if head._forward_hooks or head._forward_pre_hooks or "forward" in head.__dict__:
        raise NotImplementedError(
            f"the head of {type(model).__name__} has hooks or a forward pass of its own, which a tiled loss passes by"
        )
    return head
