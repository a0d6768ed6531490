"""What a step brings to the host: its loss, its gradient norm, and whether any rank was asked to stop."""

import torch
import torch.distributed as dist


def brought(loss: torch.Tensor, norm: torch.Tensor | float, stop: bool) -> tuple[float, float, bool]:
    """Loss and gradient norm of a step, and whether any rank was asked to stop, so that all stop after it. Collective.

    All three come to the host together: the one time in a step that it waits for the device.

    Arguments:
        loss, norm: the same on every rank.
    """
    loss = loss.detach()
    stops = torch.full_like(loss, float(stop))
    dist.all_reduce(stops)
    norm = norm.detach().to(loss) if isinstance(norm, torch.Tensor) else torch.full_like(loss, norm)
    value, norm_value, stopping = torch.stack([loss, norm.reshape(()), stops]).tolist()
    return value, norm_value, stopping > 0
