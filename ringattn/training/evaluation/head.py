"""A model's head that gives, instead of logits, what an evaluation wants of them.

Logits of a rank's tokens are t × V numbers, more than all else that is alive in a forward pass. So the head is asked,
for one forward pass, to hand its hidden states to a function, which works on them in tiles and keeps a few numbers a
token. That happens inside of the head's own call, where FSDP and ZeRO hold its weight whole.

Legend: t tokens of this rank, n rows, E hidden size, V words.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ringattn.hf.disguised import Step
from ringattn.hf.head import steps_after_head
from ringattn.hf.model import unwrapped
from ringattn.memory.head_tiles import wide_product

Look = Callable[[Tensor, Callable[[Tensor], Tensor]], None]
"""Called with hidden states (t, E) and a function from some of them, (n, E), to float32 logits (n, V)."""


class Head:
    """The head of a causal language model from transformers, also of one that an engine has sharded.

    Raises NotImplementedError for a head that is no linear layer, and for a model that does to its logits what cannot
    be done to each token by itself.
    """

    def __init__(self, model: nn.Module) -> None:
        inner = unwrapped(model)
        head = inner.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            told = "no head" if head is None else f"a {type(head).__name__} as its head"
            raise NotImplementedError(f"{type(inner).__name__} has {told}: evaluation needs a linear layer")
        self._head = head
        self._steps = _steps_of(inner, head)

    @contextmanager
    def shown_to(self, look: Look) -> Iterator[None]:
        """In here the model's forward pass calls `look` once, and its logits are one meaningless number a token."""

        def forward(hidden: Tensor) -> Tensor:
            look(hidden.flatten(0, -2), self._logits)
            return hidden.new_zeros(*hidden.shape[:-1], 1)

        attributes: dict[str, Any] = self._head.__dict__
        before = attributes.get("forward")  # of a tiled loss, say
        attributes["forward"] = forward
        try:
            yield
        finally:
            del attributes["forward"]
            if before is not None:
                attributes["forward"] = before

    def _logits(self, hidden: Tensor) -> Tensor:
        """(n, E) -> (n, V), as the model has them before its loss, in float32 at least."""
        head = self._head
        weight, bias = head.weight, head.bias
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logits = wide_product(hidden, weight.to(hidden.dtype).T, wide)
        if bias is not None:
            logits += bias
        for step in self._steps:
            logits = step.on(logits)
        return logits


def _steps_of(model: Any, head: nn.Linear) -> tuple[Step, ...]:
    handle = getattr(model, "_ringattn", None)
    tiled = None if handle is None or handle.memory is None else handle.memory.head
    return steps_after_head(model, head) if tiled is None else tiled.steps
