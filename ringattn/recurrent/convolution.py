"""Short causal convolutions over any layout: each channel with its own taps, within documents.

Legend: t local tokens, C channels, w taps, h rows received from others.
"""

from itertools import chain

import torch
from torch import Tensor

from ringattn.kept import kept
from ringattn.parallel.layout import Layout
from ringattn.recurrent.halo_plan import HaloPlan, plan_halo
from ringattn.recurrent.kernels.taps import TapsSignature, by_channels, choose_taps
from ringattn.recurrent.plan import check_layout
from ringattn.recurrent.wire import Wire, rows_of_others, wire_of

ACTIVATIONS = (None, "silu", "swish")


def parallel_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, *, activation: str | None = None
) -> Tensor:
    """What one device would compute of every document by itself, for this rank's tokens. Collective, differentiable.

        out[p, c] = activation(bias[c] + Σ_j weight[c, j] · x[p - (w - 1) + j, c])

    p counts inside of the document, before whose first token there are zeros. Padding has output 0 and gradient 0. The
    gradients of `weight` and `bias` are of this rank's tokens: add them over the ranks, as of every parameter. The
    backward pass is collective too: the loss of every rank must depend on its output.

    Arguments:
        x: (t, C), this rank's tokens in the order of `layout`.
        weight: (C, w); one tap is no convolution but allowed.
        bias: (C,) or None.
        activation: None or "silu" ("swish" is the same).

    Returns: (t, C) in the dtype of x; computed in that of weight.
    Raises ValueError naming the argument, NotImplementedError for documents that are trees.
    """
    _check(x, weight, bias, layout, activation)
    return convolve(x, weight, bias, plan_halo(layout, weight.shape[1]), wire_of(layout.mesh), activation)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, plan: HaloPlan, wire: Wire, activation: str | None = None
) -> Tensor:
    """`parallel_convolution` for checked arguments, by a plan."""
    rows = x.to(weight.dtype)
    halo = _halo(rows, plan, wire)
    source, place = _tables(plan, x.device)
    extended = torch.cat([rows, halo, rows.new_zeros(1, x.shape[1])])[source]
    taps = weight.shape[1]
    if len(extended) < taps:  # padding alone, or nothing
        return _nothing(x, halo, weight, bias)
    silu = activation is not None
    signature = TapsSignature(x.device.type, weight.dtype, x.shape[1], taps, bias is not None, silu)
    out = by_channels(choose_taps(signature), extended, weight, bias, silu)
    return torch.cat([out, out.new_zeros(1, x.shape[1])])[place].to(x.dtype)


def _halo(x: Tensor, plan: HaloPlan, wire: Wire) -> Tensor:
    """The rows before this rank's pieces, (h, C), of local rows (t, C)."""
    if not plan.communicates and not any(plan.receives):
        return x[:0]
    return rows_of_others(x, _sent(plan, x.device), [len(rows) for rows in plan.sends], plan.receives, wire)


def _nothing(x: Tensor, halo: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Zeros like x that depend on everything: parameters have a gradient on every rank, and the backward pass of the
    transfer runs on every rank."""
    parts = [one[:0].sum().to(x.dtype) for one in (x, halo, weight, bias) if one is not None]
    return sum(parts, torch.zeros_like(x))


def _sent(plan: HaloPlan, device: torch.device) -> Tensor:
    return kept(plan, ("sent", device), lambda: torch.tensor([*chain(*plan.sends)], dtype=torch.int64, device=device))


def _tables(plan: HaloPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the extended rows come from, and where each local row's output is.

    Every piece is extended by the w - 1 rows before it, so that one convolution without padding serves all; what it
    computes at the seams is not used. Sources are local rows, then received ones, then a row of zeros.
    """

    def make() -> tuple[Tensor, Tensor]:
        received, before = sum(plan.receives), plan.width - 1
        zeros = plan.tokens + received
        source: list[Tensor] = []
        place = torch.full((plan.tokens,), -1)
        at = 0
        for piece, rows in zip(plan.pieces, plan.before, strict=True):
            source.append(torch.tensor([plan.tokens + row if row >= 0 else zeros for row in rows], dtype=torch.int64))
            source.append(torch.arange(*piece.rows))
            place[slice(*piece.rows)] = torch.arange(at, at + piece.size)
            at += before + piece.size
        outputs = max(0, at - before)
        place[place < 0] = outputs
        joined = torch.cat(source) if source else torch.empty(0, dtype=torch.int64)
        return joined.to(device), place.to(device)

    return kept(plan, ("tables", device), make)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, activation: str | None) -> None:
    check_layout(layout)
    if x.dim() != 2 or len(x) != layout.tokens():
        raise ValueError(f"x must be ({layout.tokens()}, C), this rank's tokens, got {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[0] != x.shape[1] or not weight.shape[1]:
        raise ValueError(f"weight must be ({x.shape[1]}, taps), got {tuple(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (x.shape[1],):
        raise ValueError(f"bias must be ({x.shape[1]},) or None, got {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(str, ACTIVATIONS))}, got {activation!r}")
