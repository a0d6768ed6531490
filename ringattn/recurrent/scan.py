"""The scan: every piece of a document is run from the state before it, forward and backward.

A piece is the first, a middle or the last one of its document, and each takes what it needs and no more:

    forward                                        backward
    firsts run, which gives their last states U    middles and lasts run again, for R, and lasts' gradients
    middles' maps (M, U)                           R leaves
    (M, U) leave                                     whole documents' gradients
      whole documents run                            firsts run again
    states arrive                                  gradients of last states arrive
    middles and lasts run from them                firsts' and middles' gradients

What is indented is computed while the first round is under way. In the backward pass it is autograd that runs whole
documents there: of what is ready it takes what was made last, and they are made between the two functions of the cut
pieces.

Legend: t tokens, H value heads, D key dim, V value dim, n cut pieces of this rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringattn.kept import kept
from ringattn.recurrent.kernels.contract import Inputs, Kernel, maps, transposed
from ringattn.recurrent.piles import Rows, put_together, rows_of
from ringattn.recurrent.plan import Piece, RecurrencePlan
from ringattn.recurrent.walk import Shapes, Walk
from ringattn.recurrent.wire import Wire


@dataclass(frozen=True)
class _Again:
    """Pieces that were run once more, with a graph from their rows and first states."""

    rows: Inputs
    first: Tensor | None
    out: Tensor
    last: Tensor

    def gradients(self, dout: Tensor, dlast: Tensor | None) -> list[Tensor | None]:
        """Of the rows, in their order, and of the first states if there are any; nothing is done without pieces."""
        leaves = [one for one in (*self.rows, self.first) if one is not None]
        if not len(self.last):
            found = iter([torch.zeros_like(one) for one in leaves])
        else:
            last = [] if dlast is None else [dlast.to(self.last)]
            found = iter(torch.autograd.grad([self.out, self.last][: 1 + len(last)], leaves, [dout, *last]))
        return [None if one is None else next(found) for one in (*self.rows, self.first)]


@dataclass
class _Job:
    """One call: what its two functions hand each other, in both passes, beside the maps.

    One function alone would have no room for what autograd computes between its rounds, and two can hand each other
    tensors only by autograd: not a walk that is under way, nor graphs of pieces that were run again.

    Arguments:
        walk: that one function begins and the other one finishes.
        later: in the backward pass, the middles with the gradient of their outputs, and all gradients of the lasts.
    """

    plan: RecurrencePlan
    kernel: Kernel
    wire: Wire
    walk: Walk | None = None
    later: tuple[_Again, Tensor, list[Tensor | None]] | None = None

    def start(self, x: Inputs, back: bool, maps: Tensor, states: Sequence[tuple[int, Tensor]]) -> None:
        """The first round leaves.

        Arguments:
            maps: of the middles, in the direction of the walk.
            states: those that pieces give, (pieces, H, D, V) each, from which number on.
        """
        plan = self.plan
        held: list[Tensor | None] = [None] * len(plan.cut)
        matrices = list(held)
        matrices[len(plan.firsts) : len(plan.firsts) + len(plan.middles)] = maps.unbind()
        for start, values in states:
            held[start : start + len(values)] = values.unbind()
        like = x.v.new_empty(0, dtype=x.wide)
        shapes = Shapes(torch.Size(x.map_shape), torch.Size(x.state_shape), like)
        wire = self.wire if plan.communicates else None
        self.walk = Walk(plan.back if back else plan.ahead, wire, shapes, matrices, held)

    def finish(self, x: Inputs, pieces: range) -> Tensor:
        """What some of the cut pieces find, (pieces, H, D, V), none of which begins its document. Collective."""
        assert self.walk is not None, "a walk is finished that was not begun"
        found, self.walk = self.walk.finish(), None
        return _stack([found[number] for number in pieces], x)

    def again(self, x: Inputs, pieces: Sequence[Piece], state: Tensor | None) -> _Again:
        """Pieces run once more, for their gradients."""
        with torch.enable_grad():
            rows = x.leaves()
            first = None if state is None else state.detach().requires_grad_()
            return _Again(rows, first, *_run(self.kernel, rows, pieces, first))


def scan(x: Inputs, plan: RecurrencePlan, kernel: Kernel, wire: Wire) -> Tensor:
    """The outputs of a rank's rows, (t, H, V); rows of padding have 0. Collective if the plan communicates.

    So is its backward pass: the loss of every rank must depend on its output.
    """
    takes_part = plan.communicates or bool(plan.cut)
    if not takes_part and not plan.whole:
        # A rank that computes nothing has an output all the same, and gradients of 0.
        nothing = sum((one[:0].sum().to(x.v.dtype) for one in x if one is not None), x.v.new_zeros(()))
        return torch.zeros_like(x.v) + nothing
    rows = local_rows(plan, x.v.device)
    held = [rows.whole] * bool(plan.whole) + [rows.cut] * takes_part
    piles = x.taken_apart(held)
    job, out = _Job(plan, kernel, wire), []
    if takes_part:
        cut = piles[-1]
        opened, M = _Opened.apply(job, *cut)
        out += [(rows.firsts, opened)]
    if plan.whole:
        lengths = tuple(piece.size for piece in plan.whole)
        out += [(rows.whole, kernel.outputs(piles[0], lengths))]
    if takes_part:
        later = cut.rows(slice(_tokens(plan.firsts), None))
        out += [(rows.later, _Followed.apply(job, M, *(None if one is None else one.detach() for one in later)))]
    return put_together([part for _, part in out], [places for places, _ in out], plan.tokens)


class _Opened(torch.autograd.Function):
    """The rows of cut pieces, end to end, to the outputs of the first ones and the maps of the middle ones; then states
    are under way.

    Its backward pass is the last part: all gradients of the rows.
    """

    @staticmethod
    def forward(ctx: Any, job: _Job, *rows: Any) -> tuple[Tensor, Tensor]:
        plan, x = job.plan, Inputs(*rows)
        firsts, middles, _ = _parts(x, plan)
        out, last = _run(job.kernel, firsts, plan.firsts, None)
        if plan.middles:
            M, U = maps(job.kernel, middles, tuple(piece.size for piece in plan.middles))
        else:
            M, U = (x.v.new_empty(0, *shape, dtype=x.wide) for shape in (x.map_shape, x.state_shape))
        job.start(x, False, M, [(0, last), (len(plan.firsts), U)])
        ctx.job = job
        ctx.save_for_backward(*firsts)
        return out, M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        job, x = ctx.job, Inputs(*ctx.saved_tensors)
        plan = job.plan
        firsts = job.again(x, plan.firsts, None)
        ends = job.finish(x, range(len(plan.firsts) + len(plan.middles)))
        assert job.later is not None, "gradients of first states have not left"
        (middles, dout, lasts), job.later = job.later, None
        found = [
            firsts.gradients(grads[0], ends[: len(plan.firsts)]),
            middles.gradients(dout, ends[len(plan.firsts) :]),
            lasts,
        ]
        return None, *(_joined(part) for part in zip(*(one[: len(x)] for one in found), strict=True))


class _Followed(torch.autograd.Function):
    """The rows of middle and last pieces to their outputs, from the states that have arrived.

    Its backward pass is the first part: the gradients of their first states leave. Those of the rows are given by
    `_Opened`, whose backward pass follows because the maps are an input here. They have a gradient of 0: what depends
    on them is counted in the walk back.
    """

    @staticmethod
    def forward(ctx: Any, job: _Job, M: Tensor, *rows: Any) -> Tensor:
        plan, x = job.plan, Inputs(*rows)
        states = job.finish(x, range(len(plan.firsts), len(plan.cut)))
        out, _ = _run(job.kernel, x, (*plan.middles, *plan.lasts), states)
        ctx.job = job
        ctx.save_for_backward(*x, M, states)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        job: _Job = ctx.job
        *inputs, M, states = ctx.saved_tensors
        plan, x = job.plan, Inputs(*inputs)
        rows, count = _tokens(plan.middles), len(plan.middles)
        middles = job.again(x.rows(slice(rows)), plan.middles, states[:count])
        lasts = job.again(x.rows(slice(rows, None)), plan.lasts, states[count:])
        R = torch.zeros_like(states[:count])
        if count:
            assert middles.first is not None
            (R,) = torch.autograd.grad(middles.out, middles.first, grads[0][:rows], retain_graph=True)
        found = lasts.gradients(grads[0][rows:], None)
        assert found[-1] is not None
        job.later = middles, grads[0][:rows], found
        at = len(plan.firsts)
        job.start(x, True, transposed(M), [(at, R), (at + count, found[-1])])
        return None, M.new_zeros(()).expand_as(M), *[None] * len(x)


def _run(kernel: Kernel, x: Inputs, pieces: Sequence[Piece], state: Tensor | None) -> tuple[Tensor, Tensor]:
    if not pieces:  # new tensors: a function returns no input as it is
        return torch.empty_like(x.v), x.v.new_empty(0, *x.state_shape, dtype=x.wide)
    return kernel.run(x, tuple(piece.size for piece in pieces), state)


def _parts(x: Inputs, plan: RecurrencePlan) -> tuple[Inputs, Inputs, Inputs]:
    """The rows of firsts, middles and lasts."""
    a = _tokens(plan.firsts)
    b = a + _tokens(plan.middles)
    return x.rows(slice(a)), x.rows(slice(a, b)), x.rows(slice(b, None))


def _tokens(pieces: Sequence[Piece]) -> int:
    return sum(piece.size for piece in pieces)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """End to end, without a copy where one alone has rows; None where there is no such input."""
    given = [one for one in parts if one is not None]
    held = [one for one in given if len(one)] or given[:1]
    return torch.cat(held) if len(held) > 1 else held[0] if held else None


def _stack(found: Sequence[Tensor | None], x: Inputs) -> Tensor:
    """(n, H, D, V), also of none."""
    states = [one for one in found if one is not None]
    assert len(states) == len(found), "a piece begins its document that should not"
    return torch.stack(states) if states else x.v.new_empty(0, *x.state_shape, dtype=x.wide)


class LocalRows(NamedTuple):
    """Local rows of whole documents, and of pieces of cut ones: the first ones, and those after them."""

    whole: Rows
    cut: Rows
    firsts: Rows
    later: Rows


def local_rows(plan: RecurrencePlan, device: torch.device) -> LocalRows:
    """Those of a plan. Kept with it."""
    parts = (plan.whole, plan.cut, plan.firsts, (*plan.middles, *plan.lasts))
    return kept(plan, ("rows", device), lambda: LocalRows(*(rows_of(pieces, device) for pieces in parts)))
