"""Rows for kernels that count in int32: where a call has more numbers than that, it is computed in parts.

mamba-ssm (2.3.2) multiplies a chunk's first row by the stride of rows in int32, and causal-conv1d (1.7.0) counts in
uint32. Neither says anything where that overflows. Heads and channels know nothing of each other, so parts of them are
the same call.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ringattn.recurrent.kernels.contract import Inputs

COUNTED = 2**31
ALIGNED = 8  # channels of which causal-conv1d wants a multiple, in rows that stand channel by channel


def near(x: Tensor) -> Tensor:
    """The same rows, copied side by side if an int32 cannot count to the last number otherwise."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x if last < COUNTED else x.contiguous()


def gradient_near(out: Tensor) -> Tensor:
    """The same output, whose gradient comes to its kernel as `near` has it.

    Gradients of parts that were put beside each other are views of the whole one, with its strides: on an H200
    causal-conv1d's gradient of 2^32 numbers in parts was wrong from there on, though every part was few.
    """
    return _GradientNear.apply(out) if out.requires_grad else out


class _GradientNear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return near(grads[0])


def parts_of(x: Inputs) -> Iterator[tuple[slice, Inputs]]:
    """Value heads and their inputs, such that no tensor is out of reach; as a rule all of them at once.

    Raises NotImplementedError if the rows of one head are too many.
    """
    heads, key_heads = x.v.shape[1], x.k.shape[1]
    for count in range(1, heads + 1):
        even = heads % count == 0 and (key_heads % count == 0 or count % key_heads == 0)
        if even and _largest(x, count) <= COUNTED:
            break
    else:
        raise NotImplementedError(
            f"a recurrence's kernel counts the numbers of a head in int32: {len(x.v):,} rows of {x.v.shape[2]} values "
            f"and {x.k.shape[2]} keys are too many; put them on more ranks"
        )
    size, group = heads // count, heads // key_heads
    for first in range(0, heads, size):
        own = slice(first, first + size)
        keys = slice(first // group, (first + size - 1) // group + 1)
        wide = (None if one is None else one[:, own] for one in x[2:])
        part = x if count == 1 else Inputs(x.q[:, keys], x.k[:, keys], *wide)  # type: ignore[arg-type]
        yield own, Inputs(*(None if one is None else near(one) for one in part))  # type: ignore[arg-type]


def channels_of(rows: Tensor) -> Iterator[slice]:
    """Channels of (t, C) rows, such that no part has more numbers than can be counted."""
    channels = rows.shape[1]
    size = max(1, min(channels, COUNTED // max(1, len(rows))))
    size = size // ALIGNED * ALIGNED or size
    yield from (slice(first, min(first + size, channels)) for first in range(0, channels, size))


def _largest(x: Inputs, count: int) -> int:
    """Numbers of the largest tensor of a part, if heads are dealt to so many parts."""
    rows, heads, values = x.v.shape
    keys = -(-x.k.shape[1] // count)
    wide = x.decay.shape[2] if x.decay.dim() == 3 else 1
    return rows * max(heads // count * max(values, wide), keys * x.k.shape[2])
