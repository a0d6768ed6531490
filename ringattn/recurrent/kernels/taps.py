"""Kernels of short causal convolutions: causal-conv1d's where it is installed and right, else torch's.

Both get the rows of pieces end to end, and compute each piece by itself, with zeros before it.

Legend: t rows, C channels, w taps.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ringattn.environment import logger
from ringattn.kernels.apart import in_a_thread
from ringattn.kernels.probing import why_missing
from ringattn.recurrent.kernels.loading import LAYOUTS, foreign_dtypes, load, numbers
from ringattn.recurrent.kernels.reach import ALIGNED, channels_of, gradient_near
from ringattn.recurrent.kernels.selftest import TOLERANCE
from ringattn.recurrent.piles import Rows, put_together, taken_apart

Lengths = tuple[int, ...]  # of pieces, none of them empty
# (t, C), lengths, (C, w), (C,) or None, whether SiLU follows -> (t, C), in the dtype of the rows.
Taps = Callable[[Tensor, Lengths, Tensor, Tensor | None, bool], Tensor]
DISTRIBUTION = "causal-conv1d"
DEVICES = ("cuda",)
_WIDTHS = (2, 3, 4)
_TRIED = (70, 1, 2, 77)  # of the self-test


class TapsSignature(NamedTuple):
    """What a kernel is compiled for or branches on."""

    device: str
    dtype: torch.dtype
    channels: int
    width: int
    bias: bool
    silu: bool


def torchs(rows: Tensor, lengths: Lengths, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """By a grouped convolution, over pieces with zeros between them."""
    before = weight.shape[1] - 1
    places, outputs = _apart(lengths, before, rows.device)
    extended = put_together([rows], [places], len(rows) + before * len(lengths))
    found = F.conv1d(extended.mT[None], weight[:, None], bias, groups=rows.shape[1]).squeeze(0).mT
    (out,) = taken_apart(found, [outputs])
    return F.silu(out) if silu else out


def fused(rows: Tensor, lengths: Lengths, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """By causal-conv1d, which tells pieces apart by a number for each row."""
    own = {} if len(lengths) == 1 else {"seq_idx": numbers(lengths, rows.device)}
    activation = "silu" if silu else None
    out: Tensor = _function()(x=rows.contiguous().mT[None], weight=weight, bias=bias, activation=activation, **own)
    return out.squeeze(0).mT


@lru_cache(maxsize=LAYOUTS)
def _apart(lengths: Lengths, before: int, device: torch.device) -> tuple[Rows, Rows]:
    """Where rows are among pieces that have `before` rows of zeros each, and where their outputs are."""
    if len(lengths) == 1 or not before:
        return slice(before, before + sum(lengths)), slice(0, sum(lengths))
    outputs = torch.arange(sum(lengths), device=device) + before * numbers(lengths, device)[0].long()
    return outputs + before, outputs


@cache  # asked at every call
def choose_taps(signature: TapsSignature) -> Taps:
    """The fastest that is right for a call."""
    reason = fused_refusal(signature)
    logger().info("convolution by %s: %s", "torch" if reason else DISTRIBUTION, reason or signature)
    return torchs if reason else fused


def by_channels(taps: Taps, rows: Tensor, lengths: Lengths, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """What `taps` computes, in parts of the channels where there are more numbers than a kernel can count."""
    channels = list(channels_of(rows))
    if len(channels) == 1:
        return gradient_near(taps(rows, lengths, weight, bias, silu))
    biases = [None if bias is None else bias[own] for own in channels]
    found = [taps(rows[:, own], lengths, weight[own], one, silu) for own, one in zip(channels, biases, strict=True)]
    return torch.cat([gradient_near(one) for one in found], 1)


def fused_refusal(signature: TapsSignature) -> str | None:
    """Why causal-conv1d cannot do a call, as the rest of the sentence "it ...", or None."""
    if signature.device not in DEVICES:
        return f"runs on {' and '.join(DEVICES)} tensors only, got {signature.device}"
    if signature.width not in _WIDTHS or signature.channels % ALIGNED:
        return f"takes 2 to 4 taps and a multiple of {ALIGNED} channels, got {signature.width}, {signature.channels}"
    return foreign_dtypes([signature.dtype]) or why_missing(_function) or in_a_thread(lambda: _failure(signature))


def _failure(signature: TapsSignature) -> str | None:
    """The self-test: output and gradients of a small case against float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(_TRIED), signature.channels), (signature.channels, signature.width), (signature.channels,)]
    drawn = [torch.randn(shape, generator=generator, device="cpu") for shape in shapes[: 3 if signature.bias else 2]]
    inputs = [x.to(signature.device, signature.dtype) for x in drawn]
    try:
        found = _both_ways(fused, inputs, signature.silu)
    except Exception as error:  # whatever a kernel raises
        return f"failed its self-test: {type(error).__name__}: {str(error)[:200]}"
    expected = _both_ways(torchs, [x.double() for x in inputs], signature.silu)
    names = ("out", "dx", "dweight", "dbias")
    errors = {n: ((a.double() - b).norm() / b.norm()).item() for n, a, b in zip(names, found, expected, strict=False)}
    wrong = ", ".join(f"{n} {error:.2g}" for n, error in errors.items() if not error <= TOLERANCE[signature.dtype])
    return f"is wrong at {signature.width} taps (relative error of {wrong})" if wrong else None


def _both_ways(taps: Taps, inputs: list[Tensor], silu: bool) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = taps(leaves[0], _TRIED, leaves[1], leaves[2] if len(leaves) > 2 else None, silu)
        return [out.detach(), *torch.autograd.grad(out, leaves, inputs[0].flip(0))]


@cache  # what raises is not kept, so a repaired installation is found
def _function() -> Callable[..., Tensor]:
    return load(DISTRIBUTION, "causal_conv1d.causal_conv1d_fn", {"x", "weight", "bias", "seq_idx", "activation"})
