"""The loss of a step written out: what engines and models are compared with."""

from typing import Any

import torch
import torch.nn.functional as F

from ringattn import Layout
from ringattn.hf import attention_kwargs


def token_loss_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The sum of the losses of targets (t,), already shifted, -100 for none, from logits (t, V)."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets, ignore_index=-100, reduction="sum")


def backward_loss(loss_sum: torch.Tensor, targets: int, ranks: int) -> torch.Tensor:
    """What to go backward from under an engine that averages gradients over ranks."""
    return loss_sum * (ranks / targets)


def model_loss(model: Any, layout: Layout, local: torch.Tensor) -> torch.Tensor:
    """The mean loss of a parallelized model with this rank's tokens (t,) as their own targets."""
    labels = local[None]
    loss: torch.Tensor = model(
        input_ids=labels,
        position_ids=layout.position_ids(local.device)[None],
        labels=labels,
        shift_labels=labels,
        num_items_in_batch=layout.docs.total,
        use_cache=False,
        **attention_kwargs(layout),
    ).loss
    return loss
