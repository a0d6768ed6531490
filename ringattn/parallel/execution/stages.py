"""Walking the stages of a plan: transfers and kernel calls, nothing else. What is around them is the executor's: the
exchange of heads, and autograd.

Legend: n tokens of the ring position, H and K query and key heads of this rank, D head dim, V value head dim.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import itemgetter

import torch
from torch import Tensor

from ringattn.kept import kept
from ringattn.kernels.merge import merge_
from ringattn.kernels.spec import Call, Dropout, Grads, Options, Range, SavedCall, accumulation_dtype, to_device
from ringattn.parallel.execution.accumulator import Accumulator, view_rows
from ringattn.parallel.execution.job import Job, Saved, Steps
from ringattn.parallel.execution.key_transfers import KeyCast, KeyReduce
from ringattn.parallel.plan.plan import AttentionPlan, Stage


def forward_stages(
    job: Job, q: Tensor, k: Tensor, v: Tensor, out: Tensor, keep: bool
) -> Steps[tuple[Tensor, list[Tensor]]]:
    """Fills out (n, H, V); lse (H, n), and the cast keys and values if they are to be kept.

    While a stage is being computed the keys of the next are on their way, and of the last those of the next chunk.
    """
    local, *later = job.plan.stages
    lses: list[Tensor] = []
    kept_keys: list[Tensor] = []
    arriving = _Arriving(job, k, v)
    for chunk in job.chunks:
        own_q = chunk.of_chunk(q)
        results = _OutAndLse(job.plan, own_q, chunk.of_chunk(out))
        _run_calls(chunk, local, own_q, chunk.of_chunk(k), chunk.of_chunk(v), results)
        for stage in later:
            yield
            keys, values = arriving.wait()
            _run_calls(chunk, stage, own_q, keys, values, results)
            if keep:
                kept_keys += [keys, values]
            del keys, values
        results.out.finish()
        lses.append(results.finished_lse())
        del results  # and its sums
    return lses[0] if len(lses) == 1 else torch.cat(lses), kept_keys


class _OutAndLse:
    """Out and lse of all rows while calls bring their rows."""

    def __init__(self, plan: AttentionPlan, q: Tensor, out: Tensor) -> None:
        self.out = Accumulator(out, plan.shared_q, plan.uncovered)
        self._parts: list[tuple[Range, Tensor]] = []  # of the lse, joined at the end if every row is in one
        self._lse: Tensor | None = None
        if not plan.once or not q.shape[1]:
            self._lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=accumulation_dtype(q.dtype))

    def collect(self, rows: Range, lse: Tensor) -> None:
        """The lse (H, rows) of a call whose out is in place; rows that are shared are merged."""
        if self._lse is None:
            self._parts.append((rows, lse))
            return
        out = self.out
        a, b = out.inside(rows)
        if a < b:
            merge_(out.wide_rows(a, b), self._lse[:, a:b], out.rows[a:b], lse[:, _shifted((a, b), rows[0])])
        for span in out.outside(rows):
            self._lse[:, slice(*span)] = lse[:, _shifted(span, rows[0])]

    def finished_lse(self) -> Tensor:
        if self._lse is not None:
            return self._lse
        parts = [lse for _, lse in sorted(self._parts, key=itemgetter(0))]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class _Arriving:
    """The keys of later stages, for one chunk of heads after another: each is cast when those before it are there."""

    def __init__(self, job: Job, k: Tensor, v: Tensor) -> None:
        self._casts = _posted_casts(job, k, v)
        self._next = next(self._casts, None)

    def wait(self) -> tuple[Tensor, Tensor]:
        assert self._next is not None
        found = self._next.wait()
        self._next = next(self._casts, None)
        return found


class _Kept:
    """In place of `_Arriving` in a backward pass whose forward pass kept the keys: those of one stage after another."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._pairs = iter(zip(tensors[::2], tensors[1::2], strict=True))

    def wait(self) -> tuple[Tensor, Tensor]:
        return next(self._pairs)


def _posted_casts(job: Job, k: Tensor, v: Tensor) -> Iterator[KeyCast]:
    """The casts of all chunks and later stages, each posted when it is asked for: earlier its buffer would be alive."""
    for chunk in job.chunks:
        own_k, own_v = chunk.of_chunk(k), chunk.of_chunk(v)
        for stage in job.plan.stages[1:]:
            yield KeyCast.post(stage, job.ring, own_k, own_v)


def _run_calls(job: Job, stage: Stage, q: Tensor, k: Tensor, v: Tensor, results: _OutAndLse) -> None:
    """Run a stage's calls. Every call writes its rows of `out` in place."""
    if not q.shape[1]:  # this rank has no head
        return
    for call in stage.calls:
        tensors = view_rows(q, call.q), view_rows(k, call.k), view_rows(v, call.k)
        lse = job.backend.forward(*tensors, call, _options(job, stage, call), view_rows(results.out.rows, call.q))
        results.collect(call.q, lse)


def backward_stages(
    job: Job, dout: Tensor, saved: Saved, kept_keys: list[Tensor], rows: list[Tensor]
) -> Steps[list[Accumulator]]:
    """Gradients of q, k, v of this rank's rows, into `rows`; those of several chunks are finished."""
    arriving = _Kept(kept_keys) if kept_keys else _Arriving(job, saved.k, saved.v)
    if len(job.chunks) == 1:
        return (yield from _backward_chunk(job, dout, saved, arriving, rows))
    for chunk in job.chunks:
        q, k, v, out = map(chunk.of_chunk, saved[:4])
        own = Saved(q, k, v, out, chunk.of_chunk(saved.lse, 0))
        targets = [chunk.of_chunk(x) for x in rows]
        found = yield from _backward_chunk(chunk, chunk.of_chunk(dout), own, arriving, targets)
        while found:  # each goes with its sums
            found.pop().finish()
    return [Accumulator(x, (0, 0), ()) for x in rows]


def _backward_chunk(
    job: Job, dout: Tensor, saved: Saved, arriving: _Arriving | _Kept, rows: list[Tensor]
) -> Steps[list[Accumulator]]:
    """The gradients of one chunk of heads. The local stage comes last and hides the last reduce."""
    plan, (q, k, v, out, lse) = job.plan, saved
    forward = dout, q, out, lse
    local, *later = plan.stages
    single = plan.single_parts
    shared_k = (0, 0) if single else plan.shared_k
    if job.adds and (plan.sums_copies or plan.sums_groups):
        # Gradients of a head's copies are added after the exchange, or after all groups: not rounded before.
        shared_k = 0, plan.rows
    dq = Accumulator(rows[0], plan.shared_q, plan.uncovered)
    dk, dv = (Accumulator(x, shared_k, plan.without_grads if single else plan.unread, single) for x in rows[1:])
    reduce: KeyReduce | None = None
    for stage in later:
        yield
        keys, values = arriving.wait()
        # What travels in float32 is not rounded before, nor are gradients of a token that stands in a buffer twice.
        summed = stage.overlapping_keys or (job.adds and (plan.wide_reduce or stage.repeated_keys))
        shared = (0, stage.rows) if summed else (0, 0)
        dkeys, dvalues = (
            Accumulator(torch.empty_like(x), shared, stage.unread, stage.single_parts) for x in (keys, values)
        )
        _run_backward_calls(job, stage, forward, keys, values, dq, dkeys, dvalues)
        del keys, values
        if reduce is not None:
            yield
            reduce.wait(dk, dv)
            reduce = None  # the gradients of two stages at most are alive, and one message
        reduce = KeyReduce.post(stage, job.ring, dkeys, dvalues, plan.wide_reduce)
        del dkeys, dvalues
    _run_backward_calls(job, local, forward, k, v, dq, dk, dv)
    if reduce is not None:
        yield
        reduce.wait(dk, dv)
    return [dq, dk, dv]


def _run_backward_calls(
    job: Job,
    stage: Stage,
    forward: tuple[Tensor, Tensor, Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    dq: Accumulator,
    dk: Accumulator,
    dv: Accumulator,
) -> None:
    """Run a stage's calls backward. Kernels write gradient rows in place, and add those that are shared: the kernel
    itself if it can, else here, from rounded parts."""
    dout, q, out, lse = forward
    if not q.shape[1]:  # this rank has no head
        return
    for call in stage.calls:
        lse_rows = lse if call.q == (0, lse.shape[1]) else lse[:, slice(*call.q)]
        saved = SavedCall(
            view_rows(q, call.q), view_rows(k, call.k), view_rows(v, call.k), view_rows(out, call.q), lse_rows, call,
            _options(job, stage, call),
        )  # fmt: skip
        dout_rows = view_rows(dout, call.q)
        if job.adds:
            sums = dq.sum(call.q), dk.sum(call.k), dv.sum(call.k)
            target = Grads(view_rows(dq.rows, call.q), view_rows(dk.rows, call.k), view_rows(dv.rows, call.k), sums)
            job.backend.backward(dout_rows, saved, target)
            continue
        target = Grads(view_rows(dq.rows, call.q), _key_rows(dk, call), _key_rows(dv, call))
        job.backend.backward(dout_rows, saved, target)
        dq.collect(call.q)
        for grad, written in ((dk, target.dk), (dv, target.dv)):
            for run in call.key_runs:
                if not call.dense_keys:
                    grad.rows[slice(*run)] = written[_shifted(run, call.k[0])]
                grad.collect(run)


def _options(job: Job, stage: Stage, call: Call) -> Options:
    """The options of one call: with dropout also where its rows are in the global stream."""
    if job.dropout is None:
        return job.options
    plan = job.plan
    keys = plan if stage is plan.stages[0] else stage
    q_index, k_index = (_row_indices(of, job.device)[slice(*rows)] for of, rows in ((plan, call.q), (keys, call.k)))
    return replace(job.options, dropout=Dropout(*job.dropout, q_index, k_index, job.first_head))


def _row_indices(of: AttentionPlan | Stage, device: torch.device) -> Tensor:
    """Global index of each row, kept with the plan: the layers of a step ask for the same."""

    def make() -> Tensor:
        return to_device(torch.cat([torch.arange(*span, device="cpu") for span in of.index]), device)

    return kept(of, ("indices", device), make)


def _key_rows(grad: Accumulator, call: Call) -> Tensor:
    """Where a kernel writes the gradient of a call's keys: in place, unless it would also write rows between them."""
    rows = view_rows(grad.rows, call.k)
    return rows if call.dense_keys else torch.empty_like(rows)


def _shifted(span: Range, base: int) -> slice:
    return slice(span[0] - base, span[1] - base)
