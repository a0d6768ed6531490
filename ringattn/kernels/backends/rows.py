"""Tensors as kernels want them: heads laid end to end, or one sequence as a batch."""

from torch import Tensor


def rows_of_heads(x: Tensor) -> Tensor:
    """x, copied only if the numbers of a head are not side by side, which is all that most kernels need."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_batch(*tensors: Tensor) -> list[Tensor]:
    """(T, H, D) -> (1, H, T, D), as operators want it that know batches of one length; views."""
    return [x.transpose(0, 1)[None] for x in tensors]


def from_batch(x: Tensor) -> Tensor:
    """(1, H, T, D) -> (T, H, D); a view."""
    return x[0].transpose(0, 1)
