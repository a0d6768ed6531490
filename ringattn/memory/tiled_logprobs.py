"""Log-probabilities of targets, of whose logits only a tile of tokens is alive at a time.

Legend: t tokens, m targets, E hidden size, V words.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringattn.kernels.call import to_device
from ringattn.memory.head_tiles import Gradients, Head, Transform
from ringattn.memory.picks import Several, Triples
from ringattn.memory.tiled_loss import TILE, check_head, under_autocast
from ringattn.trees.targets import Targets


def tiled_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Targets,
    *,
    bias: Tensor | None = None,
    transform: Transform | None = None,
    tile: int = TILE,
) -> Tensor:
    """The log-probability of every target: log softmax of `transform(hidden @ weight.T + bias)`, at row and label.

    Differentiable in `hidden`, `weight` and `bias`: logits are made again in the backward pass, where the gradient is
    known. So it serves objectives that are no weighted sum, such as clipped ratios; for a weighted sum `tiled_loss`
    makes logits once. Weights of targets do not matter here, those of weight 0 are computed too.

    Arguments:
        hidden: (t, E).
        weight: (V, E), of the dtype of `hidden` (under autocast both are cast); with a head that FSDP or ZeRO shards,
            call it inside of the head's forward pass.
        targets: m triples of the t rows.
        bias, transform, tile: as for `tiled_loss`.

    Returns: (m,) in the order of `targets`, float32 (float64 of float64).
    Raises ValueError for shapes, dtypes or a tile that do not fit.
    """
    hidden, weight = under_autocast(hidden), under_autocast(weight)
    if not isinstance(targets, Targets):
        raise ValueError(f"targets must be Targets, triples, got {type(targets).__name__}")
    check_head(hidden, weight, targets, bias, tile)
    return _TiledLogprobs.apply(hidden, weight, bias, transform, Triples(targets, tile))


class _TiledLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform | None, triples: Triples
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.transform, ctx.triples = transform, triples
        head = Head(weight, bias, transform, 0.0, 1.0, wide)
        out = hidden.new_empty(len(triples.order), dtype=wide)
        with torch.autocast(hidden.device.type, enabled=False):  # logits are float32 matrix products too
            parts = [head.log_probs_of(hidden[one.rows], one) for one in _tiles(triples, out)]
        if parts:
            out[to_device(triples.order, out.device)] = torch.cat(parts)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        (grad,), triples = upstream, ctx.triples
        grads = Gradients(hidden, weight, bias, ctx.needs_input_grad[:3], grad.dtype)
        # The gradient of a sum of losses, each of which is a log-probability with its sign changed.
        head = Head(weight, bias, ctx.transform, 0.0, -1.0, grad.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for one in _tiles(triples, grad[to_device(triples.order, grad.device)]):
                head.loss_of(hidden[one.rows], one, grads.at(one.rows))
        made = zip(grads.made(), (hidden, weight, bias), strict=True)
        return *(None if one is None else one.to(of.dtype) for one, of in made), None, None


def _tiles(triples: Triples, weights: Tensor) -> Iterator[Several]:
    return triples.tiles(weights, weights.device)
