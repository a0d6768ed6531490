"""Rows taken apart into piles, and piles put together into rows: each is the other's backward pass.

torch's own `x[rows]` fills as many zeros as x has for the gradient of every pile, copies the pile into them, adds them
all up, and sorts the numbers of rows where these are no slice. That was 5 % of a layer of Mamba-2 with nothing cut. As
no row is in two piles, its gradient is only put into its place here, and not even that where a pile is all there is.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringattn.kernels.spec import to_device
from ringattn.recurrent.plan import Piece

Rows = slice | Tensor
"""Those of a pile: neighbours, or (n,) numbers on the device."""


def rows_of(pieces: Sequence[Piece], device: torch.device) -> Rows:
    """The local rows of pieces, end to end: a slice where they are neighbours."""
    if not pieces:
        return slice(0, 0)
    if all(a.rows[1] == b.row for a, b in pairwise(pieces)):
        return slice(pieces[0].row, pieces[-1].rows[1])
    return to_device(torch.cat([torch.arange(*piece.rows, device="cpu") for piece in pieces]), device)


def taken_apart(x: Tensor, piles: Sequence[Rows]) -> tuple[Tensor, ...]:
    """The rows of (t, ...) that every pile has; they are not to be changed in place. No row may be in two of them."""
    if len(piles) == 1 and _is_all(piles[0], len(x)):
        return (x,)
    found: tuple[Tensor, ...] = _TakenApart.apply(x, tuple(piles))
    return found


def put_together(parts: Sequence[Tensor], piles: Sequence[Rows], count: int) -> Tensor:
    """(count, ...) rows, every pile's in their places and 0 where there is none. The parts are one or more."""
    if len(parts) == 1 and _is_all(piles[0], count):
        return parts[0]
    found: Tensor = _PutTogether.apply(tuple(piles), count, *parts)
    return found


class _TakenApart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, piles: tuple[Rows, ...]) -> tuple[Tensor, ...]:
        ctx.piles, ctx.count = piles, len(x)
        return _taken(x, piles)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _put(grads, ctx.piles, ctx.count), None


class _PutTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, piles: tuple[Rows, ...], count: int, *parts: Tensor) -> Tensor:
        ctx.piles = piles
        return _put(parts, piles, count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *_taken(grads[0], ctx.piles)


def _taken(x: Tensor, piles: Sequence[Rows]) -> tuple[Tensor, ...]:
    return tuple(x[rows] if isinstance(rows, slice) else x.index_select(0, rows) for rows in piles)


def _put(parts: Sequence[Tensor], piles: Sequence[Rows], count: int) -> Tensor:
    for part, rows in zip(parts, piles, strict=True):
        if _is_all(rows, count):
            return part.view_as(part)  # a function may not return what it was given
    complete = sum(len(part) for part in parts) == count
    out = (parts[0].new_empty if complete else parts[0].new_zeros)(count, *parts[0].shape[1:])
    for part, rows in zip(parts, piles, strict=True):
        out[rows] = part
    return out


def _is_all(rows: Rows, count: int) -> bool:
    return isinstance(rows, slice) and rows == slice(0, count)
