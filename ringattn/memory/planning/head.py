"""What head and loss hold: logits of all tokens, or of a tile, and their gradients."""

from collections.abc import Iterator
from dataclasses import dataclass

from ringattn.memory.planning.items import HEAD, Items
from ringattn.memory.planning.shapes import ModelShape

WIDE = 4


@dataclass(frozen=True)
class Head:
    """The head of a model on a rank.

    Arguments:
        tile: tokens whose logits are there at a time; None: plain logits and loss.
    """

    model: ModelShape
    tokens: int
    itemsize: int
    tile: int | None

    @property
    def _weights(self) -> int:
        return self.model.vocabulary * self.model.hidden

    @property
    def trained(self) -> bool:
        return bool((self.model.embedding if self.model.tied else self.model.head).trained)

    @property
    def stream(self) -> int:
        return self.tokens * self.model.hidden * self.itemsize

    @property
    def _logit_bytes(self) -> int:
        """Of one copy in float32."""
        return min(self.tokens, self.tile or self.tokens) * self.model.vocabulary * WIDE

    @property
    def _narrow(self) -> int:
        """Of one copy in the dtype of products, if that is another."""
        return self._logit_bytes // 2 if self.itemsize < WIDE else 0

    @property
    def left(self) -> int:
        """Of the forward pass for the backward pass: gradients, or what gradients are made of."""
        if self.tile is None:
            return self._logit_bytes + self.stream
        return self.stream + self.trained * WIDE * self._weights

    def forward(self) -> Iterator[tuple[str, Items]]:
        """Moments beside the head's input and weights."""
        steps = self.model.logit_steps
        if self.tile is None:
            own = (self._narrow or self._logit_bytes) * (1 + self.model.logits_kept)
            yield "logits and loss", {HEAD: own + (1 + (self._narrow > 0)) * self._logit_bytes}
            return
        # Logits, their softmax, and that in the dtype of products; with a softcap what stands between them too.
        copies = (2 + (steps and 1 + steps)) * self._logit_bytes + self._narrow
        yield "logits and loss of a tile", {HEAD: self.left + copies + self._tile_rows}

    def backward(self) -> Iterator[tuple[str, Items]]:
        """Moments beside the gradient of the head's weights, where it is made here."""
        if self.tile is None:
            # The softmax, its gradient and that of the logits.
            kept = self.model.logits_kept * (self._narrow or self._logit_bytes)
            yield "logits and loss", {HEAD: 3 * self._logit_bytes + kept + self.stream}
            return
        yield "gradients of the head", {HEAD: self.left}

    @property
    def _tile_rows(self) -> int:
        """The gradient of a tile's hidden states."""
        return min(self.tokens, self.tile or self.tokens) * self.model.hidden * self.itemsize
