"""What a pass takes: from the work of its stages to seconds, of one rank or of all ring positions at once. Pure.

The only place where rows and calls become seconds: whether work was read from a plan or counted, it is priced here. A
cast travels while the stage before it is computed, and so does the reduce of a stage in the backward pass; the exchange
of heads stands before and after. Ranks are priced one by one, as if nobody waited for another.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from ringattn.parallel.machine.machine import Machine, copy_seconds, merge_seconds, transfer_seconds
from ringattn.parallel.pricing.exchange_times import ExchangeTimes
from ringattn.parallel.pricing.timeline import DirectionCost, StageCost, backward_timeline, forward_timeline
from ringattn.parallel.schedules.stage_work import StageWork
from ringattn.parallel.transport.buffers import PULLED

# A backward pass and its calls, in those of a forward pass: by eye, of hist16k on 2 GPUs with FlashAttention 4.
BACKWARD_HOST = 1.7


@dataclass(frozen=True)
class PassTimes:
    """Seconds of one pass: of one rank, or arrays, of many.

    Arguments:
        compute: of kernels, and of the copies and merges between them.
        wire: of all that travels.
        waiting: of kernels, for transfers.
        lost: that kernels would lose, were all that is waited for to travel beside them.
        host: that it takes to issue everything.
    """

    compute: Any
    wire: Any
    waiting: Any
    lost: Any
    host: Any

    @property
    def slowest(self) -> DirectionCost:
        """The rank that decides, which may wait for its host."""
        compute, wire, waiting, host = map(np.atleast_1d, (self.compute, self.wire, self.waiting, self.host))
        exposed = np.maximum(waiting, host - compute)
        at = int(np.argmax(compute + exposed))
        return DirectionCost(float(compute[at]), float(wire[at]), float(exposed[at]))


class _Transfer(NamedTuple):
    """Seconds of the casts, or reduces, of all stages beside kernels, those that kernels lose by them, and those of
    what is pulled."""

    seconds: Any = 0.0
    lost: Any = 0.0
    pulled: Any = 0.0


def stage_cost(machine: Machine, work: StageWork, keep_keys: bool, wide_reduce: bool) -> StageCost:
    """The cost of all stages of a pass, in the arrays of `work`; for one chunk of heads.

    Arguments:
        keep_keys, wide_reduce: see `AttentionPlan`.
    """
    own, moved, compute = work.own, work.moved, work.kernels
    if np.any(work.merged):
        # Query rows that are in several calls are added in float32: one part is read, the sum is read and written.
        dim = own.head_dim if work.backward else own.value_dim
        added = own.query_heads * dim * (2 * own.wide + own.itemsize)
        compute = compute + merge_seconds(machine, work.merged * added, work.calls)
    cast = returned = _Transfer()
    if not (work.backward and keep_keys):
        # Rows are packed into messages, and what arrived and local rows are put in their places in the buffer.
        compute = compute + copy_seconds(machine, (moved.sent_rows + work.buffers) * own.key_row_bytes, 2)
        cast = _transfer(machine, moved.by_class, moved.most_sent, own.key_row_bytes)
    if work.backward:
        # Gradients of what arrived are packed, and what comes back is added to the rows' own, like that of copies.
        rows = 2 * moved.received_rows + 3 * moved.sent_rows + 3 * work.copied
        compute = compute + merge_seconds(machine, rows * own.wide_key_row_bytes, 2)
        row_bytes = own.wide_key_row_bytes if wide_reduce else own.key_row_bytes
        returned = _transfer(machine, moved.by_class, moved.most_returned, row_bytes)
    return StageCost(compute, cast.seconds, returned.seconds, cast.pulled + returned.pulled, cast.lost + returned.lost)


def _transfer(machine: Machine, moved: dict[str, Any], most: Any, row_bytes: int) -> _Transfer:
    """Transfers of each stage, over all classes of link at the same time.

    Arguments:
        moved: rows by class of link.
        most: rows that any rank sends, (stages, ...).
    """
    sizes = {name: rows * row_bytes for name, rows in moved.items()}
    seconds = reduce(np.maximum, (transfer_seconds(machine, size, name, "p2p") for name, size in sizes.items()))
    lost = sum(size * machine.links[name, "p2p"].disturbance for name, size in sizes.items())
    if "ring" not in machine.engines:
        return _Transfer(seconds, lost)
    pulled = pulls(machine, most * row_bytes)
    return _Transfer(seconds * ~pulled, lost * ~pulled, seconds * pulled)


def pulls(machine: Machine, most: Any) -> Any:
    """Whether messages on the ring axis are pulled, of which any rank sends so many bytes at most."""
    return ("ring" in machine.engines) & (most <= PULLED)


def pass_times(
    machine: Machine, work: StageWork, exchanged: ExchangeTimes, chunks: int, keep_keys: bool, wide_reduce: bool
) -> PassTimes:
    """One pass over the stages of `work`.

    Arguments:
        exchanged: of the heads, before and after the stages.
        chunks: of heads, one computed after another.
        keep_keys, wide_reduce: see `AttentionPlan`.
    """
    cost = stage_cost(machine, work, keep_keys, wide_reduce)
    exposed = (backward_timeline if work.backward else forward_timeline)(cost.stages, chunks)
    lost, beside, pulled = (chunks * _total(part) for part in (cost.lost, cost.cast + cost.reduce, cost.pulled))
    # Kernels lose time by all that travels beside them, but not by what they wait for.
    disturbance = lost * (1 - np.minimum(exposed / np.maximum(beside, 1e-12), 1.0))
    host = host_seconds(
        machine,
        calls=chunks * _total(work.calls),
        casts=0 if work.backward and keep_keys else chunks * work.later,
        reduces=chunks * work.later if work.backward else 0,
        exchanged=exchanged.messages > 0,
        messages=chunks * work.messages,
        backward=work.backward,
    )
    return PassTimes(
        compute=chunks * _total(cost.compute) + disturbance + exchanged.copies,
        wire=beside + pulled + exchanged.wire,
        waiting=exposed + pulled + exchanged.wire,
        lost=lost - disturbance + exchanged.lost,
        host=host,
    )


def _total(stages: Any) -> Any:
    """Over all stages."""
    return stages.sum(0) if np.ndim(stages) else stages


def host_seconds(
    machine: Machine, *, calls: Any, casts: int, reduces: int, exchanged: bool, messages: Any, backward: bool
) -> Any:
    """Seconds that the host takes to issue a pass: one thread launches everything, and no pass is faster than it.

    Arguments:
        calls: of the kernel; backward each comes with smaller kernels.
        casts, reduces: transfers on the ring axis.
        exchanged: heads travel there and back.
        messages: all that are sent and received in the casts, one a peer; those of the reduces are as many.
    """
    transfers = casts + reduces + 2 * exchanged
    peers = messages * ((casts > 0) + (reduces > 0))
    own = machine.host_pass + machine.host_call * calls
    return own * (BACKWARD_HOST if backward else 1) + machine.host_pass * transfers + machine.host_message * peers
