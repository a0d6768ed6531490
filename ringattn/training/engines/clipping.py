"""The gradient norm of sharded parameters, and clipping by it."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def clip_sharded(
    parameters: Iterable[nn.Parameter], limit: float, device: torch.device, group: dist.ProcessGroup
) -> Tensor:
    """Scales gradients so that their global norm is at most `limit`; returns the norm before, a scalar on `device`.

    torch's own `clip_grad_norm_` would reduce the norm where the gradients are; on the host NCCL cannot. Here every
    rank computes that of its shards where they are, in float32 at least, and one number is added up on `device`.
    Nothing waits for the device where gradients are on it.

    Arguments:
        parameters: each a DTensor that is sharded over `group` and nothing else, as FSDP2 makes them.
        limit: 0 does not clip.
    """
    grads = [_local(p.grad) for p in parameters if p.grad is not None]
    total = _squares(grads, device)
    dist.all_reduce(total, group=group)
    norm = total.sqrt()
    if limit > 0 and grads:
        factor = (limit / (norm + 1e-6)).clamp(max=1.0).to(grads[0].device)
        for grad in grads:
            grad.mul_(factor)
    return norm


def _squares(grads: list[Tensor], device: torch.device) -> Tensor:
    """Sum of the squares of all numbers, on `device`."""
    if not grads:
        return torch.zeros((), device=device)
    norms = [torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32)) for grad in grads]
    return torch.stack(norms).square().sum().to(device)


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad
