"""A head over a tile of hidden states: logits, losses, and the gradients that a tile adds.

Legend: n rows of a tile, m targets of a tile, E hidden size, V words.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ringattn.memory.picks import Picks, Rows

Transform = Callable[[Tensor], Tensor]


class Head:
    """What makes losses of hidden states."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        transform: Transform | None,
        z_loss: float,
        scale: float | Tensor,
        wide: torch.dtype,
    ) -> None:
        self.weight, self.bias, self.transform = weight, bias, transform
        self.z_loss, self.scale, self.wide = z_loss, scale, wide

    def loss_of(self, hidden: Tensor, picks: Picks, grads: "TileGradients | None") -> Tensor:
        """The loss of a tile of rows (n, E), all of which have targets if gradients are wanted of them."""
        logits, scores = self._scores(hidden, grads is not None)
        log_probs = torch.log_softmax(scores.detach(), 1)
        picked = picks.of(log_probs)
        log_sums = picks.of(scores.detach()) - picked
        losses = self.z_loss * log_sums.square() - picked if self.z_loss else -picked
        counted = picks.weights * self.scale
        if grads is not None:
            slope = log_probs.exp_().mul_(picks.by_row(counted * (1 + 2 * self.z_loss * log_sums)))
            picks.subtract(slope, counted)
            if self.transform is not None:
                (slope,) = torch.autograd.grad(scores, logits, slope)
            grads.add(slope, hidden, self.weight)
        return (losses * counted).sum()

    def log_probs_of(self, hidden: Tensor, picks: Picks) -> Tensor:
        """The log-probabilities of a tile's targets."""
        return picks.of(torch.log_softmax(self._scores(hidden, False)[1], 1))

    def _scores(self, hidden: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
        """Logits, and what the model makes of them, which is differentiable if that is wanted."""
        logits = wide_product(hidden, self.weight.T, self.wide)
        if self.bias is not None:
            logits += self.bias
        if self.transform is None:
            return logits, logits
        with torch.enable_grad():
            return logits, self.transform(logits.requires_grad_(wanted))


class Gradients:
    """Gradients of hidden states, weight and bias, those that are wanted."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, ...], wide: torch.dtype
    ) -> None:
        self.wanted = any(wanted)
        self.hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if wanted[0] else None
        self.weight = weight.new_zeros(weight.shape, dtype=wide) if wanted[1] else None
        self.bias = bias.new_zeros(bias.shape, dtype=wide) if bias is not None and wanted[2] else None

    def at(self, rows: Rows) -> "TileGradients":
        """What the tile of these rows, of whom no other tile has one, adds to."""
        return TileGradients(self, rows)

    def made(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Those of hidden states, weight and bias; None for what is not wanted."""
        return self.hidden, self.weight, self.bias


class TileGradients:
    """Where the gradients of a tile go."""

    def __init__(self, of: Gradients, rows: Rows) -> None:
        self.of, self.rows = of, rows

    def add(self, slope: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Of logits with the gradient `slope` (n, V), float32 or wider."""
        if self.of.bias is not None:
            self.of.bias += slope.sum(0)
        narrow = slope.to(hidden.dtype)
        if self.of.hidden is not None:
            self.of.hidden[self.rows] = narrow @ weight
        if self.of.weight is not None:
            _add_product(self.of.weight, narrow.T, hidden)


def wide_product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """a @ b as it was added up, not rounded to the dtype of `a`."""
    if a.dtype == wide:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the precision of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
