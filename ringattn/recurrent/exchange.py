"""The exchange: every sequence rank computes whole documents of some heads, as Ulysses does for attention.

One all-to-all gives a rank all tokens of its heads, another one brings its outputs back. Key heads that value heads of
several ranks share go to all of these, and their gradients are added.

Legend: T tokens of the stream, t of this rank, H value heads, K key heads, P ranks.
"""

from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringattn.kept import kept
from ringattn.kernels.spec import Range, to_device
from ringattn.parallel.layout import Layout
from ringattn.recurrent.kernels.contract import Inputs, Kernel
from ringattn.recurrent.piles import put_together, taken_apart
from ringattn.recurrent.plan import pieces_of
from ringattn.recurrent.wire import Wire


@dataclass(frozen=True)
class HeadShares:
    """Which heads each rank computes.

    Arguments:
        values: value heads of every rank, in equal runs as far as they divide.
        keys: the key heads that these need; a head may be on several ranks.
        tokens: of every rank.
        rank: whose plan it is.
    """

    values: tuple[Range, ...]
    keys: tuple[Range, ...]
    tokens: tuple[int, ...]
    rank: int

    @property
    def heads(self) -> int:
        """Value heads of this rank."""
        first, last = self.values[self.rank]
        return last - first

    @property
    def copied(self) -> tuple[int, ...] | None:
        """For each of this rank's value heads its key head, counted from the rank's first; None where each key head
        serves as many neighbours as the others, as kernels take them."""
        (first, last), keys = self.values[self.rank], self.keys[self.rank]
        each = self.values[-1][1] // self.keys[-1][1]
        served = [head // each - keys[0] for head in range(first, last)]
        count = keys[1] - keys[0]
        even = not served or (
            len(served) % count == 0 and served == [j * count // len(served) for j in range(len(served))]
        )
        return None if even else tuple(served)

    @property
    def key_heads(self) -> int:
        """Those that this rank's kernel is given."""
        first, last = self.keys[self.rank]
        return last - first if self.copied is None else self.heads


def head_shares(heads: tuple[int, int], layout: Layout, rank: int | None = None) -> HeadShares:
    """The shares of (key heads, value heads) of a layout's ranks."""
    K, H = heads
    rank = layout.mesh.sequence_rank if rank is None else rank
    ranks = layout.mesh.sequence_size

    values = tuple((one * H // ranks, (one + 1) * H // ranks) for one in range(ranks))
    each = H // K
    keys = tuple((a // each, -(-b // each)) if a < b else (0, 0) for a, b in values)
    return HeadShares(values, keys, tuple(layout.tokens(one) for one in range(ranks)), rank)


@dataclass(frozen=True)
class ExchangePlan:
    """What one rank does in an exchange.

    Arguments:
        shares: the heads that it is given, and those that others are.
        lengths: of documents, none of them empty.
        tokens: of the stream, padding included.
        pieces: (row, size) of every piece of a document, in the order of the stream: its first row among the tokens
            rank by rank, and how many there are.
    """

    shares: HeadShares
    lengths: tuple[int, ...]
    tokens: int
    pieces: tuple[Range, ...]


def plan_exchange(layout: Layout, heads: tuple[int, int], rank: int | None = None) -> ExchangePlan:
    """The plan of a sequence rank (default: the layout's own) for (key heads, value heads)."""
    ranks = range(layout.mesh.sequence_size)
    starts = accumulate((layout.tokens(one) for one in ranks), initial=0)
    pieces = sorted(
        (piece.document, piece.first, start + piece.row, piece.size)
        for start, held in zip(starts, pieces_of(layout), strict=False)
        for piece in held
    )
    return ExchangePlan(
        shares=head_shares(heads, layout, rank),
        lengths=tuple(length for length in layout.docs.lengths if length),
        tokens=layout.docs.total,
        pieces=tuple((row, size) for *_, row, size in pieces),
    )


def exchange(x: Inputs, plan: ExchangePlan, kernel: Kernel, wire: Wire) -> Tensor:
    """The outputs of a rank's rows, (t, H, V); rows of padding have 0. Collective, and so is its backward pass."""
    shares, order = plan.shares, stream_order(plan, x.v.device)
    D = x.k.shape[2]

    def dealt(rows: Tensor, columns: tuple[Range, ...]) -> Tensor:
        """This rank's heads of all tokens, rank by rank."""
        return _Deal.apply(rows, shares, columns, wire)

    def ordered(rows: Tensor) -> Tensor:
        """Those of documents in the order of the stream, contiguous as kernels want them."""
        return taken_apart(rows, [order])[0]

    q, k = map(ordered, dealt(torch.cat([x.q, x.k], 2), shares.keys).split([D, D], 2))
    v = ordered(dealt(x.v, shares.values))
    rest = [x.decay if x.decay.dim() == 3 else x.decay[..., None]]
    rest += [one[..., None] for one in (x.beta, x.step) if one is not None]
    widest = reduce(torch.promote_types, [one.dtype for one in rest])
    gates = ordered(dealt(torch.cat([one.to(widest) for one in rest], 2), shares.values))
    decay, *others = gates.split([one.shape[2] for one in rest], 2)
    found = iter(one[..., 0] for one in others)
    beta, step = (None if one is None else next(found).to(one.dtype) for one in (x.beta, x.step))
    decay = (decay if x.decay.dim() == 3 else decay[..., 0]).to(x.decay.dtype)
    if shares.copied is not None:  # a rank's value heads need not begin with the first that its key head serves
        q, k = q[:, shares.copied], k[:, shares.copied]
    heads = Inputs(q, k, v, decay, beta, step)
    if plan.lengths and shares.heads:
        out = kernel.outputs(heads, plan.lengths)
    else:  # nothing to compute, but all ranks take part in the backward pass
        out = v + 0 * (q.sum() + k.sum() + gates.sum()).to(v.dtype)
    return _Return.apply(put_together([out], [order], plan.tokens), shares, wire)


class _Deal(torch.autograd.Function):
    """(t, heads, ...) of this rank's tokens -> (T, its heads, ...), the tokens rank by rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: HeadShares, columns: tuple[Range, ...], wire: Wire) -> Tensor:
        ctx.shares, ctx.columns, ctx.wire, ctx.heads = shares, columns, wire, x.shape[1]
        return _deal(x, shares, columns, wire)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _give_back(grads[0], ctx.heads, ctx.shares, ctx.columns, ctx.wire), None, None, None


class _Return(torch.autograd.Function):
    """(T, its value heads, ...) -> (t, all value heads, ...) of this rank's tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: HeadShares, wire: Wire) -> Tensor:
        ctx.shares, ctx.wire = shares, wire
        return _give_back(x, shares.values[-1][1], shares, shares.values, wire)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _deal(grads[0], ctx.shares, ctx.shares.values, ctx.wire), None, None


def _deal(x: Tensor, shares: HeadShares, columns: tuple[Range, ...], wire: Wire) -> Tensor:
    mine = columns[shares.rank]
    size = x.shape[2:].numel()
    sends = [len(x) * (b - a) * size for a, b in columns]
    receives = [tokens * (mine[1] - mine[0]) * size for tokens in shares.tokens]
    send = _packed(x, columns, sends)
    return wire.exchange(send, sends, receives).view(sum(shares.tokens), mine[1] - mine[0], *x.shape[2:])


def _give_back(x: Tensor, heads: int, shares: HeadShares, columns: tuple[Range, ...], wire: Wire) -> Tensor:
    """The transposed of `_deal`: what ranks have of the same head is added, in float32 or wider."""
    tokens, size = shares.tokens[shares.rank], x.shape[2:].numel()
    sends = [rows * x.shape[1] * size for rows in shares.tokens]
    receives = [tokens * (b - a) * size for a, b in columns]
    received = wire.exchange(x.reshape(-1), sends, receives)
    if _are_even(columns, heads):
        by_rank = received.view(len(columns), tokens, heads // len(columns), *x.shape[2:])
        return by_rank.transpose(0, 1).reshape(tokens, heads, *x.shape[2:])
    flat = received.split(receives)
    parts = [part.view(tokens, b - a, *x.shape[2:]) for part, (a, b) in zip(flat, columns, strict=True)]
    if sum(b - a for a, b in columns) == heads:  # each head is on one rank
        return torch.cat(parts, 1)
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.new_zeros(tokens, heads, *x.shape[2:], dtype=wide)
    for (a, b), part in zip(columns, parts, strict=True):
        out[:, a:b] += part
    return out.to(x.dtype)


def _packed(x: Tensor, columns: tuple[Range, ...], sizes: list[int]) -> Tensor:
    """The columns for each rank, one rank after another, copied once."""
    if _are_even(columns, x.shape[1]):
        return x.unflatten(1, (len(columns), x.shape[1] // len(columns))).transpose(0, 1).reshape(-1)
    out = x.new_empty(sum(sizes))
    for part, (a, b) in zip(out.split(sizes), columns, strict=True):
        part.view(len(x), b - a, *x.shape[2:]).copy_(x[:, a:b])
    return out


def _are_even(columns: tuple[Range, ...], heads: int) -> bool:
    """Whether every rank has as many heads as another, and none that another has: then one copy does for all ranks."""
    each, rest = divmod(heads, len(columns))
    return not rest and all(pair == (each * rank, each * (rank + 1)) for rank, pair in enumerate(columns))


def stream_order(plan: ExchangePlan, device: torch.device) -> Tensor:
    """Rows, among the tokens rank by rank, of the documents' tokens end to end: (sum of lengths,).

    A number for every piece goes to the device, and every token's is counted there. Kept with the plan.
    """

    def make() -> Tensor:
        sizes = [size for _, size in plan.pieces]
        total = sum(sizes)
        shifts = [row - before for (row, _), before in zip(plan.pieces, accumulate(sizes, initial=0), strict=False)]
        shift, size = (to_device(torch.tensor(one, dtype=torch.int64, device="cpu"), device) for one in (shifts, sizes))
        return torch.arange(total, device=device) + shift.repeat_interleave(size, output_size=total)

    return kept(plan, ("stream order", device), make)
