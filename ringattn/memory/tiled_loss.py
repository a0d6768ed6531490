"""The loss of a language model's head, of whose logits only a tile of tokens is alive at a time.

A vocabulary of 128,256 words makes 0.5 MB of float32 logits a token, and the plain way holds three copies of them: more
than all the layers keep. Here each tile goes forward and backward at once, since the gradient of a sum of losses needs
nothing from later: what is left of a tile are its loss, the gradient of its hidden states, and what it adds to the
gradient of the head. (The idea is of Liger and of ALST, arXiv 2506.13996. Both lose accuracy with the number of tiles,
as they add up the head's gradient in its own dtype; here it is added up in float32.)

Legend: t tokens, n rows of a tile, E hidden size, V words.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringattn.kernels.call import to_device
from ringattn.memory.head_tiles import Gradients, Head, Transform
from ringattn.memory.picks import IGNORE_INDEX, Picks, Triples, one_each
from ringattn.trees.targets import Targets

# Tokens: 1 GiB of logits at 128,256 words. On an H200 it takes 3.7 % longer than all logits at once with Llama-8B's
# head, 4096 tokens 0.9 % and 1024 tokens 12 %, as each tile reads and writes the whole gradient of the head.
TILE = 2048


def tiled_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | Targets,
    *,
    bias: Tensor | None = None,
    transform: Transform | None = None,
    z_loss: float = 0.0,
    scale: float | Tensor = 1.0,
    tile: int = TILE,
    count: int | None = None,
) -> Tensor:
    """The sum over targets of the cross entropy of `transform(hidden @ weight.T + bias)`, times `scale`.

    Gradients of `hidden`, `weight` and `bias` are made in the forward pass, if they are wanted at all, and only scaled
    in the backward pass. Rows without a target are skipped, which waits once for the device unless `count` is given
    (and except while a CUDA graph is captured). Call it where the weight is whole: with a head that FSDP or ZeRO
    shards, inside of its forward pass.

    Arguments:
        hidden: (t, E).
        weight: (V, E), of the dtype of `hidden` (under autocast both are cast). Products are made in that dtype, and
            logits, losses and sums of gradients in float32 at least.
        targets: (t,) integers below V, or -100: no target. Or `Targets`, triples of the t rows: each loss counts with
            its weight, a row's logits are made once, and triples of weight 0 are left out. Then nothing waits.
        bias: (V,).
        transform: what the model does with its logits, element by element and without parameters, as softcapping
            `lambda x: 30 * torch.tanh(x / 30)`.
        z_loss: weight of the square of each target's log-sum-exp, which is added to its loss (PaLM, arXiv 2204.02311).
        scale: number, or tensor without dimensions: as one over the targets of all ranks. It has no gradient.
        tile: tokens of a tile.
        count: how many of t integers are none of -100, if the host knows. Another number than there are is a
            ValueError on the CPU, and on a GPU a failed assertion of the device.

    Returns: scalar, float32 (float64 of float64); 0 without any target.
    Raises ValueError for shapes, dtypes or a tile that do not fit.
    """
    hidden, weight = under_autocast(hidden), under_autocast(weight)
    check_head(hidden, weight, targets, bias, tile)
    if not torch.is_grad_enabled():  # autograd tells a function what requires gradients, but not this
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    tiles = _tiles(targets, tile, count, hidden)
    return _TiledLoss.apply(hidden, weight, bias, transform, z_loss, scale, tiles)


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transform: Transform | None,
        z_loss: float,
        scale: float | Tensor,
        tiles: Iterator[Picks],
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        # In float16 a gradient that is divided by a million targets is zero: it is scaled at the end, with the scale of
        # the loss that such training has.
        late = hidden.dtype == torch.float16
        grads = Gradients(hidden, weight, bias, ctx.needs_input_grad[:3], wide)
        head = Head(weight, bias, transform, z_loss, 1.0 if late else scale, wide)
        with torch.autocast(hidden.device.type, enabled=False):  # logits are float32 matrix products too
            losses = [
                head.loss_of(hidden[one.rows], one, grads.at(one.rows) if grads.wanted else None) for one in tiles
            ]
        # Added up at the end, in a tree: one after another, a thousand tiles would round a thousand times.
        total = torch.stack(losses).sum() if losses else hidden.new_zeros((), dtype=wide)
        ctx.late = scale if late else 1.0
        ctx.kept = grads.made() if grads.wanted else (None, None, None)
        return total * ctx.late

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.kept is None:
            raise RuntimeError("the gradients of tiled_loss are given out once: retain_graph is of no use here")
        kept, ctx.kept = ctx.kept, None
        factor = upstream[0] * ctx.late
        return *(None if grad is None else grad.mul_(factor) for grad in kept), *[None] * 4


def _tiles(targets: Tensor | Targets, tile: int, count: int | None, hidden: Tensor) -> Iterator[Picks]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if not isinstance(targets, Targets):
        return one_each(targets, tile, _checked(count, targets), wide)
    if count is not None:
        raise ValueError(f"count is of targets that are one integer a row, got {count} with triples, which know it")
    triples = Triples(targets, tile, targets.weights != 0)
    return triples.tiles(to_device(targets.weights[triples.order].to(wide), hidden.device), hidden.device)


def _checked(count: int | None, targets: Tensor) -> int | None:
    """The number of targets. A wrong one would leave some out without a word."""
    if count is None:
        return None
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= len(targets):
        raise ValueError(f"count must be a number of the {len(targets)} targets, got {count!r}")
    found = (targets != IGNORE_INDEX).sum()
    if targets.is_cuda:
        torch._assert_async(found == count, f"tiled_loss was told of {count} targets, and there are others")
    elif found != count:
        raise ValueError(f"count must be the number of targets that are not {IGNORE_INDEX}, {int(found)}, got {count}")
    return count


def under_autocast(x: Tensor) -> Tensor:
    """Under autocast what a linear layer would make of it."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device)) if x.is_floating_point() and x.dtype != torch.float64 else x


def check_head(hidden: Tensor, weight: Tensor, targets: Tensor | Targets, bias: Tensor | None, tile: int) -> None:
    """Raises ValueError for shapes, dtypes or a tile that do not fit."""
    if not isinstance(tile, int) or isinstance(tile, bool) or tile < 1:
        raise ValueError(f"tile must be a number of tokens >= 1, got {tile!r}")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be (t, E) and weight (V, E), got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}")
    if isinstance(targets, Targets):
        _check_triples(hidden, weight, targets)
    elif targets.shape != hidden.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"targets must be {len(hidden)} integers, one for each row of hidden, got {tuple(targets.shape)} "
            f"of {targets.dtype}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), one for each row of weight, got {tuple(bias.shape)}")


def _check_triples(hidden: Tensor, weight: Tensor, targets: Targets) -> None:
    if targets.tokens != len(hidden):
        raise ValueError(
            f"targets must be of the {len(hidden)} rows of hidden, got triples of {targets.tokens} tokens: take this "
            "rank's with targets.shard(layout)"
        )
    if len(targets) and targets.labels.max() >= len(weight):
        raise ValueError(f"targets must have labels below {len(weight)}, got {int(targets.labels.max())}")
    if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
        raise NotImplementedError("targets that are triples come from the host in each step: no CUDA graph holds them")
