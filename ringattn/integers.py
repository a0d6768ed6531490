"""Integers as they come: sequences, tensors, rows of a batch; and runs of equal ones."""

from collections.abc import Sequence
from itertools import pairwise
from math import isfinite
from operator import index
from typing import Any

import torch

IntegerLike = Sequence[int] | torch.Tensor


def integers(values: Any, name: str) -> tuple[int, ...]:
    """A sequence or one-dimensional tensor; 3.0 is none of them. Raises ValueError naming the argument."""
    if isinstance(values, torch.Tensor):
        if values.dim() != 1 or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise ValueError(f"{name} must be one-dimensional integers, got {tuple(values.shape)} of {values.dtype}")
        return tuple(values.tolist())
    try:
        out = tuple(index(value) for value in values)
    except (TypeError, ValueError, RuntimeError):
        if isinstance(values, list | tuple) and all(isinstance(one, int | float) and isfinite(one) for one in values):
            raise ValueError(f"{name} must be integers, got {shown(values)}") from None
        raise ValueError(f"{name} must be a sequence of integers, got {_short(values)}") from None
    if any(isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool for value in values):
        raise ValueError(f"{name} must be integers, got {shown(values)}")
    return out


def rows_of(values: Any, name: str) -> list[list[int]]:
    """Nested rows of a (T,) or (B, T) tensor or list; bool counts as 0 and 1."""
    try:
        tensor = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be integers of shape (T,) or (B, T): {error}") from None
    if tensor.numel() == 0:  # an empty list becomes a float tensor
        tensor = tensor.to(torch.int64)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dim() not in (1, 2):
        raise ValueError(
            f"{name} must be integers of shape (T,) or (B, T), got {tuple(tensor.shape)} of {tensor.dtype}"
        )
    return torch.atleast_2d(tensor.to(torch.int64)).tolist()


def runs_of(row: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of equal neighbours."""
    bounds = [0] + [i for i in range(1, len(row)) if row[i] != row[i - 1]] + [len(row)]
    return [(a, b) for a, b in pairwise(bounds) if b > a]


def shown(values: Sequence[int]) -> str:
    """The first of some integers, for an error."""
    first = ", ".join(str(value) for value in list(values)[:6])
    return f"[{first}{', ...' if len(values) > 6 else ''}]"


def _short(values: Any) -> str:
    text = repr(values)
    return text if len(text) <= 80 else f"{text[:77]}..."
