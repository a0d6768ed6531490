"""Short causal convolutions over any layout: each channel with its own taps, within documents.

Legend: t local tokens, n of them in documents, C channels, w taps, h rows received from others.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, count
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringattn.kept import kept
from ringattn.kernels.spec import to_device
from ringattn.parallel.layout import Layout
from ringattn.recurrent.halo_plan import HaloPlan, plan_halo
from ringattn.recurrent.kernels.taps import TapsSignature, by_channels, choose_taps
from ringattn.recurrent.piles import Rows, put_together, rows_of, taken_apart
from ringattn.recurrent.plan import Piece, check_layout
from ringattn.recurrent.wire import Wire, wire_of

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
    tables = tables_of(plan, x.device)
    (rows,) = taken_apart(x.to(weight.dtype), [tables.held])
    before = rows[:0], rows[:0]
    if tables.moves:
        rows, *before = _Lent.apply(rows, tables, plan, wire)
    if not len(rows):  # padding alone, or nothing
        return _nothing(x, rows, *before, weight, bias)
    silu = activation is not None
    taps = choose_taps(TapsSignature(x.device.type, weight.dtype, x.shape[1], weight.shape[1], bias is not None, silu))
    out = by_channels(taps, rows, tables.lengths, weight, bias, silu)
    if tables.openings:
        # The first rows of pieces that do not open their documents have seen zeros. They are few, and done once more.
        source = torch.cat([*before, rows.new_zeros(1, x.shape[1])])[tables.source]
        found = by_channels(taps, source, tables.openings, weight, bias, silu)
        out = out.index_copy(0, tables.heads, found[tables.places])
    return put_together([out], [tables.held], plan.tokens).to(x.dtype)


@dataclass(frozen=True)
class _Tables:
    """A plan's rows on a device. Those of documents are held end to end, in the order of pieces; others are padding.

    Arguments:
        held: their local rows.
        lengths: of the pieces.
        heads: (m,) of those held, the first rows of pieces that do not open their documents, fewer than taps of each.
        openings: lengths of these with the rows before them, a piece's each.
        source: where each row of them comes from: the rows of others, then the heads, then a row of zeros.
        places: (m,) where the heads are among them.
        sent: of those held, what others are sent, by the rank that it goes to.
        touched, slots: the held rows among `heads` and `sent`, once each, and which of them each one is.
        moves: whether there are heads, or rows move between ranks.
    """

    held: Rows
    lengths: tuple[int, ...]
    heads: Tensor
    openings: tuple[int, ...]
    source: Tensor
    places: Tensor
    sent: Tensor
    touched: Tensor
    slots: Tensor
    moves: bool


class _Lent(torch.autograd.Function):
    """Held rows (n, C) -> the same, the rows of others before this rank's pieces (h, C), and heads (m, C). Collective.

    What comes back for single rows is added in float32 or wider to the gradient of all, which is copied once: torch
    would make as many zeros as there are rows, twice, and add them all.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, tables: _Tables, plan: HaloPlan, wire: Wire) -> tuple[Tensor, Tensor, Tensor]:
        ctx.tables, ctx.plan, ctx.wire = tables, plan, wire
        halo = rows[:0].clone()
        if _is_sent(plan):
            halo = wire.exchange(rows[tables.sent], _sends(plan), plan.receives)
        return rows.view_as(rows), halo, rows[tables.heads]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        whole, halo, heads = grads
        tables, plan = ctx.tables, ctx.plan
        returned = ctx.wire.exchange(halo.contiguous(), plan.receives, _sends(plan)) if _is_sent(plan) else heads[:0]
        wide = torch.promote_types(whole.dtype, torch.float32)
        few = torch.cat([heads, returned]).to(wide)
        sums = whole[tables.touched].to(wide).index_add_(0, tables.slots, few)
        return whole.index_copy(0, tables.touched, sums.to(whole.dtype)), None, None, None


def _is_sent(plan: HaloPlan) -> bool:
    """Whether any row is received, of another rank or of a piece of this one; or elsewhere, which all take part in."""
    return plan.communicates or any(plan.receives)


def _sends(plan: HaloPlan) -> list[int]:
    return [len(rows) for rows in plan.sends]


def _nothing(x: Tensor, *others: Tensor | None) -> Tensor:
    """Zeros like x that depend on everything: parameters have a gradient on every rank, and the backward pass of the
    transfer runs on every rank."""
    parts = [one[:0].sum().to(x.dtype) for one in (x, *others) if one is not None]
    return sum(parts, torch.zeros_like(x))


def tables_of(plan: HaloPlan, device: torch.device) -> _Tables:
    """Those of a plan. Kept with it."""
    return kept(plan, ("tables", device), lambda: _make_tables(plan, device))


def _make_tables(plan: HaloPlan, device: torch.device) -> _Tables:
    received, before = sum(plan.receives), plan.width - 1
    firsts = [piece.row for piece in plan.pieces]
    ends = [0, *accumulate(piece.size for piece in plan.pieces)]

    def place_of(row: int) -> int:
        """Among those held, of a local row."""
        piece = bisect_right(firsts, row) - 1
        return ends[piece] + row - firsts[piece]

    heads: list[int] = []
    source: list[int] = []
    places: list[int] = []
    openings: list[int] = []
    zeros = received + sum(min(before, piece.size) for piece, rows in _cut(plan))
    for piece, rows in _cut(plan):
        own = min(before, piece.size)
        places += range(len(source) + before, len(source) + before + own)
        source += [row if row >= 0 else zeros for row in rows]
        source += range(received + len(heads), received + len(heads) + own)
        heads += range(place_of(piece.row), place_of(piece.row) + own)
        openings.append(before + own)
    sent = [place_of(row) for row in chain(*plan.sends)]
    touched = sorted({*heads, *sent})
    slot_of = dict(zip(touched, count()))

    def on_device(rows: Sequence[int]) -> Tensor:
        return to_device(torch.tensor(rows, dtype=torch.int64, device="cpu"), device)

    return _Tables(
        held=rows_of(plan.pieces, device),
        lengths=tuple(piece.size for piece in plan.pieces),
        heads=on_device(heads),
        openings=tuple(openings),
        source=on_device(source),
        places=on_device(places),
        sent=on_device(sent),
        touched=on_device(touched),
        slots=on_device([slot_of[row] for row in (*heads, *sent)]),
        moves=bool(heads) or _is_sent(plan),
    )


def _cut(plan: HaloPlan) -> Iterator[tuple[Piece, tuple[int, ...]]]:
    """Pieces that do not open their documents, and the rows before them."""
    for piece, rows in zip(plan.pieces, plan.before, strict=True):
        if any(row >= 0 for row in rows):
            yield piece, rows


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
