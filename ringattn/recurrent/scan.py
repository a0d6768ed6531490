"""The scan: states walk through the pieces of cut documents as affine maps, forward and backward.

Legend: t tokens, H value heads, D key dim, V value dim, n cut pieces of this rank, P ranks, s places a rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringattn.kept import kept
from ringattn.recurrent.kernels.contract import Inputs, Kernel, apply_map, apply_transposed, maps
from ringattn.recurrent.plan import Piece, RecurrencePlan
from ringattn.recurrent.wire import Wire


@dataclass(frozen=True)
class Scan:
    """What the pieces of cut documents are computed with."""

    plan: RecurrencePlan
    kernel: Kernel
    wire: Wire

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(piece.size for piece in self.plan.cut)

    def gathered(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Something for each cut piece, (n, ...) each, of all ranks in their places: (P s, ...) each. Collective if the
        plan communicates."""
        message = torch.cat([part.flatten(1) for part in parts], 1)
        padded = message.new_zeros(self.plan.slots, message.shape[1])
        padded[: len(message)] = message
        if self.plan.communicates:
            rows = self.wire.gather(padded).flatten(0, 1)
        else:  # places of other ranks are in no chain that this one walks
            rows = message.new_zeros((self.plan.rank + 1) * self.plan.slots, message.shape[1])
            rows[self.plan.rank * self.plan.slots :] = padded
        pieces = rows.split([part[0].numel() if len(part) else part.shape[1:].numel() for part in parts], 1)
        return [rows.reshape(len(rows), *part.shape[1:]) for rows, part in zip(pieces, parts, strict=True)]

    def walk(
        self, chains: Sequence[Sequence[int]], step: Callable[[Tensor, list[int]], Tensor], like: Tensor
    ) -> Tensor:
        """What every cut piece of this rank finds when its turn comes, (n, H, D, V): zeros at the start of a chain,
        then what `step` made of that at the piece before.

        Arguments:
            step: from the values at some places, and the places, to those at the next.
            like: (..., H, D, V), the shape and dtype of a value.
        """
        found = like.new_zeros(len(self.plan.cut), *like.shape[1:])
        first = self.plan.rank * self.plan.slots
        ordered = sorted(chains, key=len, reverse=True)
        value = like.new_zeros(len(ordered), *like.shape[1:])
        for depth in range(len(ordered[0]) if ordered else 0):
            active = [chain for chain in ordered if len(chain) > depth]
            places = [chain[depth] for chain in active]
            value = value[: len(active)]
            own = [index for index, place in enumerate(places) if place in self.plan.own]
            if own:
                found[[places[index] - first for index in own]] = value[own]
            if depth < len(ordered[0]) - 1:
                value = step(value, places)
        return found


def scan(x: Inputs, plan: RecurrencePlan, kernel: Kernel, wire: Wire) -> Tensor:
    """The outputs of a rank's rows, (t, H, V); rows of padding have 0. Collective if the plan communicates.

    So is its backward pass: the loss of every rank must depend on its output.
    """
    out: list[Tensor] = []
    if plan.whole:
        out.append(kernel.outputs(x.rows(_rows(plan.whole)), tuple(piece.size for piece in plan.whole)))
    if plan.communicates or plan.cut:
        cut = x.rows(_rows(plan.cut))
        out.append(_Pieces.apply(*cut, Scan(plan, kernel, wire)))
    if len(out) == 1 and len(out[0]) == plan.tokens and not (plan.whole and plan.cut):
        held = plan.whole or plan.cut
        if [piece.row for piece in held] == sorted(piece.row for piece in held):
            return out[0]
    # A rank that computes nothing has an output all the same, and gradients of 0.
    nothing = sum((one[:0].sum().to(x.v.dtype) for one in x if one is not None), x.v.new_zeros(1, *x.v.shape[1:]))
    rows = torch.cat([*out, nothing])
    return rows[_places(plan, x.v.device)]


class _Pieces(torch.autograd.Function):
    """The pieces of cut documents: their rows, end to end, to their outputs."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *rows, job = args
        x = Inputs(*rows)
        M, U = job.gathered(maps(job.kernel, x, job.lengths))
        states = job.walk(job.plan.ahead, lambda S, at: apply_map(M[at], S) + U[at], U)
        out, _ = job.kernel.run(x, job.lengths, states)
        ctx.job = job
        ctx.save_for_backward(*x, M, states)
        return out if len(out) else out.clone()  # no input is returned as it is

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        job: Scan = ctx.job
        *inputs, M, states = ctx.saved_tensors
        x = Inputs(*inputs)
        with torch.enable_grad():
            leaves, heads = x.leaves(), states.detach().requires_grad_()
            out, last = job.kernel.run(leaves, job.lengths, heads)
        R = torch.zeros_like(states)
        if job.lengths:
            (R,) = torch.autograd.grad(out, heads, grads[0], retain_graph=True)
        (R,) = job.gathered([R])
        ends = job.walk(job.plan.back, lambda dS, at: apply_transposed(M[at], dS) + R[at], R)
        if not job.lengths:
            return *(None if one is None else torch.zeros_like(one) for one in x), None
        wanted = [one for one in leaves if one is not None]
        found = iter(torch.autograd.grad([out, last], wanted, [grads[0], ends.to(last)]))
        return *(None if one is None else next(found) for one in leaves), None


def _rows(pieces: Sequence[Piece]) -> Tensor | slice:
    """The rows of pieces, end to end: a slice where they are neighbours."""
    if not pieces:
        return slice(0, 0)
    if all(a.rows[1] == b.row for a, b in pairwise(pieces)):
        return slice(pieces[0].row, pieces[-1].rows[1])
    return torch.cat([torch.arange(*piece.rows) for piece in pieces])


def _places(plan: RecurrencePlan, device: torch.device) -> Tensor:
    """(t,): where every local row's output is, those of whole documents before those of cut ones and a row of zeros."""

    def make() -> Tensor:
        held = [*plan.whole, *plan.cut]
        total = sum(piece.size for piece in held)
        places = torch.full((plan.tokens,), total)
        at = 0
        for piece in held:
            places[slice(*piece.rows)] = torch.arange(at, at + piece.size)
            at += piece.size
        return places.to(device)

    return kept(plan, ("places", device), make)
