"""The token loss, exact for any split of the global batch over ranks and micro-steps."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ringattn.training.packing import NO_TARGET


def token_loss_sum(logits_tV: torch.Tensor, targets_t: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropies of the local targets, a fp32 scalar with a gradient.

    Arguments:
        logits_tV: (t, V) of this rank's tokens, any float dtype; the softmax is computed in fp32, in fp64 for fp64.
        targets_t: (t,) int64, already shifted, -100 where there is none.

    A rank without targets, or without tokens, gets 0 with a gradient of 0: it must still take part in the backward
    pass, whose collectives need every rank.
    """
    logits_tV = logits_tV if logits_tV.dtype == torch.float64 else logits_tV.float()
    if targets_t.numel() == 0:
        return logits_tV.sum()  # cross_entropy of no rows has no gradient to give on every device
    return F.cross_entropy(logits_tV, targets_t, ignore_index=NO_TARGET, reduction="sum")


def backward_loss(loss_sum: torch.Tensor, global_targets: int, world_size: int) -> torch.Tensor:
    """The scalar to call backward on.

    The wanted gradient is that of (sum over all ranks and micro-steps of loss_sum) / global_targets. Each engine
    averages gradients over all W = data × sequence ranks, that is, sums them and divides by W; so each rank scales its
    share by W. This is the only place that does. A batch without any target has a zero gradient.
    """
    return loss_sum * (world_size / max(global_targets, 1))


def share(loss_sum: torch.Tensor, norm: torch.Tensor | float, stop: bool) -> tuple[float, float, bool]:
    """The sum of all ranks' detached loss sums, the gradient norm, and whether any rank was asked to stop. Collective.

    One all-reduce carries loss and stop, so that all ranks stop after the same step, and all three come to the host
    together: the one time in a step that it waits for the device. On the CPU it adds in fp64.

    Arguments:
        norm: the same on every rank.
    """
    loss_sum = loss_sum.detach().to(torch.float64 if loss_sum.device.type == "cpu" else torch.float32)
    shared = torch.stack([loss_sum, torch.full_like(loss_sum, float(stop))])
    dist.all_reduce(shared)
    norm = norm.detach().to(shared) if isinstance(norm, torch.Tensor) else torch.full_like(loss_sum, norm)
    total, stops, norm_value = torch.cat([shared, norm.reshape(1)]).tolist()
    return total, norm_value, stops > 0
