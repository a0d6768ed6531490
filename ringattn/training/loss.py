"""What a step brings to the host: its loss, its gradient norm, whether any rank was asked to stop, and whether all did
the same."""

from typing import NamedTuple

import torch
import torch.distributed as dist


class Brought(NamedTuple):
    """A step's results, the same on every rank: mean loss and gradient norm of the global batch, whether any rank was
    asked to stop, and whether all ranks did what they call the same step."""

    loss: float
    norm: float
    stopping: bool
    alike: bool = True


def brought(loss: torch.Tensor, norm: torch.Tensor | float, stop: bool, digest: int = 0) -> Brought:
    """Loss and gradient norm of a step, and whether any rank was asked to stop, so that all stop after it. Collective.

    All of it comes to the host together: the one time in a step that it waits for the device.

    Arguments:
        loss, norm: the same on every rank.
        digest: of what the step was, 0 to below 2^62; ranks that are one run have the same.
    """
    loss = loss.detach()
    highest = torch.stack([torch.full_like(loss, value, dtype=torch.int64) for value in (int(stop), digest, -digest)])
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    stops, differs = highest[0] > 0, highest[1] != -highest[2]
    norm = norm.detach().to(loss) if isinstance(norm, torch.Tensor) else torch.full_like(loss, norm)
    value, norm_value, stopping, apart = torch.stack(
        [loss, norm.reshape(()), stops.to(loss), differs.to(loss)]
    ).tolist()
    return Brought(value, norm_value, stopping > 0, not apart)


def spoiling(loss: torch.Tensor) -> torch.Tensor:
    """The same loss, whose gradients are NaN where it is not finite.

    An infinite loss may have finite gradients. This way every engine sees a step that is to be left out by its gradient
    norm alone, without waiting for the device. A finite loss is multiplied by exactly 1.
    """
    whole = torch.isfinite(loss.detach())
    return loss * torch.where(whole, 1.0, float("nan")).to(loss.dtype)
