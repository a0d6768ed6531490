"""What a plan costs on a machine: seconds of kernels, copies and wire, and what of the wire no kernel hides. Pure.

The executor's order is played through for one rank: a cast travels while the stage before it is computed, and so does
the reduce of a stage in the backward pass; the exchange of heads stands before and after. Ranks are priced one by one,
as if nobody waited for another; the slowest decides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ringattn.kernels.spec import Call
from ringattn.parallel.machine import CLASSES, Machine, copy_seconds, merge_seconds, transfer_seconds
from ringattn.parallel.memory import buffer_bytes
from ringattn.parallel.messages import PULLED, Widths, exchange_messages, rank_widths
from ringattn.parallel.plan import AttentionPlan, Exchange, Message, Shape, Stage
from ringattn.parallel.rates import BlockTable

# A backward pass and its calls, in those of a forward pass: by eye, of hist16k on 2 GPUs with FlashAttention 4.
BACKWARD_HOST = 1.7


@dataclass(frozen=True)
class StageCost:
    """One stage of one rank in one direction (or arrays, of many ranks).

    Arguments:
        compute: seconds of its calls, and of merges and copies around them.
        cast: seconds on the wire before its keys are there.
        reduce: seconds on the wire to return its key gradients (backward).
        pulled: seconds of both instead, where kernels pull what travels: between others, so that nothing hides it.
        copies: of `compute`, what is not the kernels'.
        lost: seconds that kernels lose if all of the transfers travel beside them.
    """

    compute: Any
    cast: Any = 0.0
    reduce: Any = 0.0
    pulled: Any = 0.0
    copies: Any = 0.0
    lost: Any = 0.0


@dataclass(frozen=True)
class DirectionCost:
    """One pass of one rank: seconds of compute, of wire, and of waiting for wire that nothing hides or for the host."""

    compute: float
    wire: float
    exposed: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


@dataclass(frozen=True)
class PlanCost:
    """Forward and backward of one rank, or of the slowest; `buffer_bytes` is memory beside q, k, v and out."""

    forward: DirectionCost
    backward: DirectionCost
    buffer_bytes: int

    @property
    def total(self) -> float:
        return self.forward.seconds + self.backward.seconds


def call_seconds(machine: Machine, call: Call, shape: Shape, backward: bool) -> float:
    """One kernel launch; `shape` is of the rank that computes it (`Shape.share`)."""
    return float(calls_seconds(machine, BlockTable.of([call]), shape, backward)[0])


def calls_seconds(machine: Machine, blocks: BlockTable, shape: Shape, backward: bool) -> Any:
    """Seconds of each call of a table, as an array."""
    rate = machine.rate(max(shape.head_dim, shape.value_dim), backward)
    return rate.seconds(blocks, shape.query_heads, shape.head_dim + shape.value_dim)


def stage_costs(machine: Machine, plan: AttentionPlan, shape: Shape, backward: bool) -> tuple[StageCost, ...]:
    """The stages of a rank's plan, in the order of the plan, without the exchange; for one chunk of heads.

    Arguments:
        shape: the model's; the rank's share of the heads is taken from the plan.
    """
    own = plan.own(shape)
    costs = []
    for number, stage in enumerate(plan.stages):
        compute = float(calls_seconds(machine, BlockTable.of(stage.calls), own, backward).sum())
        copies = _merges(machine, plan, stage, own, backward)
        cast, reduce = _Wire(), _Wire()
        if number:
            rows = _rows_by_class(machine, plan, stage)
            if not (backward and plan.keep_keys):
                copies += _cast_copies(machine, stage, own)
                cast = _wire(machine, rows, stage.cast.most, own.key_row_bytes)
            if backward:
                row_bytes = own.wide_key_row_bytes if plan.wide_reduce else own.key_row_bytes
                copies += _reduce_copies(machine, stage, own)
                reduce = _wire(machine, rows, stage.back.most, row_bytes)
        pulled, lost = cast.pulled + reduce.pulled, cast.lost + reduce.lost
        costs.append(StageCost(compute + copies, cast.seconds, reduce.seconds, pulled, copies, lost))
    return tuple(costs)


def _merges(machine: Machine, plan: AttentionPlan, stage: Stage, own: Shape, backward: bool) -> float:
    """Rows of queries that are in several calls are added in float32: one part read, the sum read and written."""
    first, last = plan.shared_q
    dim = own.head_dim if backward else own.value_dim
    rows = sum(max(0, min(call.q[1], last) - max(call.q[0], first)) for call in stage.calls)
    return merge_seconds(machine, rows * own.query_heads * dim * (2 * own.wide + own.itemsize), len(stage.calls))


def _cast_copies(machine: Machine, stage: Stage, own: Shape) -> float:
    """Rows packed into messages, and what arrived and local rows put in their places in the buffer."""
    return copy_seconds(machine, (stage.cast.sent + stage.rows) * own.key_row_bytes, 2)


def _reduce_copies(machine: Machine, stage: Stage, own: Shape) -> float:
    """Gradients of the buffer's rows packed, and what came back added to the rows' own."""
    rows = 2 * stage.back.sent + 3 * stage.back.received + 3 * (stage.rows - stage.cast.received)
    return merge_seconds(machine, rows * own.wide_key_row_bytes, 2)


def _rows_by_class(machine: Machine, plan: AttentionPlan, stage: Stage) -> dict[str, int]:
    """Key rows that are sent or received, whichever is more, over each class of link."""
    return {
        link_class: max(
            sum(message.rows for message in messages if _class_of(machine, plan, message) == link_class)
            for messages in (stage.sends, stage.receives)
        )
        for link_class in CLASSES
    }


class _Wire(NamedTuple):
    """Seconds of a batch of messages beside kernels, those that kernels lose by it, and those of one that is pulled."""

    seconds: float = 0.0
    lost: float = 0.0
    pulled: float = 0.0


def _wire(machine: Machine, rows: Mapping[str, int], most: int, row_bytes: float) -> _Wire:
    """Both directions and both classes of link at the same time.

    Arguments:
        most: rows that any rank sends.
    """
    seconds = max(transfer_seconds(machine, rows[name] * row_bytes, name, "p2p") for name in CLASSES)
    if pulls(machine, most * row_bytes):
        return _Wire(pulled=seconds)
    lost = sum(rows[name] * row_bytes * machine.links[name, "p2p"].disturbance for name in CLASSES)
    return _Wire(seconds, lost)


def pulls(machine: Machine, most: Any) -> Any:
    """Whether messages on the ring axis are pulled, of which any rank sends so many bytes at most."""
    return ("ring" in machine.engines) & (most <= PULLED)


def _class_of(machine: Machine, plan: AttentionPlan, message: Message) -> str:
    ulysses, rank = (1, 0) if plan.exchange is None else (len(plan.exchange.rows), plan.exchange.rank)
    return machine.link_class(plan.ring_rank * ulysses + rank, message.peer * ulysses + rank)


def exchange_seconds(
    machine: Machine, exchange: Exchange | None, ring_rank: int, shape: Shape, backward: bool, wide_reduce: bool = True
) -> tuple[float, float]:
    """Wire and copies of the exchange of heads in one pass, seconds.

    Queries, keys and values go there in one message and the output comes back; in the backward pass the output's
    gradient goes there and those of queries, keys and values come back. Tokens' rows are packed before they leave, and
    unpacked when they are back.
    """
    if exchange is None:
        return 0.0, 0.0
    there, back = exchange_messages(exchange, shape, backward, wide_reduce)
    wire = sum(_message_seconds(machine, exchange, ring_rank, widths) for widths in (*there, *back))
    copied = sum(exchange.own_rows * sum(rank_widths(exchange, widths)) for widths in (*there, *back))
    return wire, copy_seconds(machine, copied, len(there) + len(back))


def group_seconds(
    machine: Machine, exchange: Exchange, calls: Sequence[Call], shape: Shape, groups: int, wide_reduce: bool = True
) -> float:
    """Both passes of a plan without casts whose heads travel in groups: the first group's way there and the last one's
    way back are waited for, the others' travel beside the kernels if those take long enough.

    Arguments:
        calls: of the whole pass.
    """
    own, total = shape.share(exchange), 0.0
    part = replace(own, query_heads=own.query_heads // groups, key_heads=max(1, own.key_heads // groups))
    table = BlockTable.of(calls)
    for backward in (False, True):
        kernels = groups * float(calls_seconds(machine, table, part, backward).sum())
        there, back = exchange_messages(exchange, shape, backward, wide_reduce, groups)
        seconds = [_message_seconds(machine, exchange, 0, widths) for widths in (*there, *back)]
        first, last = seconds[0], sum(seconds[len(there) + groups - 1 :])
        beside = sum(seconds) - first - last
        counted = len(seconds) - 1 - len(seconds[len(there) + groups - 1 :])
        lost = exchange_loss(machine, exchange, beside, counted)
        hidden = kernels * (groups - 1) / groups
        summed = 0.0
        if backward and groups > 1:  # the gradients of all keys are added up beside the message
            summed = merge_seconds(machine, groups * 3 * exchange.position_rows * own.wide_key_row_bytes, 3 * groups)
        total += kernels + lost + first + last + max(0.0, beside - hidden) + summed
    return total


def exchange_loss(machine: Machine, exchange: Exchange, seconds: float, messages: int) -> float:
    """Seconds that kernels lose by so many messages of an exchange, of `seconds` together, beside them."""
    link = machine.links[machine.link_class(0, len(exchange.rows) - 1), "all_to_all"]
    return max(0.0, seconds - messages * link.latency) * link.bandwidth * link.disturbance


def _message_seconds(machine: Machine, exchange: Exchange, ring_rank: int, widths: Widths) -> float:
    first = ring_rank * len(exchange.rows)
    by_rank = rank_widths(exchange, widths)
    mine = by_rank[exchange.rank]
    sent, received = exchange.own_rows * (sum(by_rank) - mine), (exchange.position_rows - exchange.own_rows) * mine
    link_class = machine.link_class(first, first + len(exchange.rows) - 1)
    return transfer_seconds(machine, max(sent, received), link_class, "all_to_all")


def rank_cost(machine: Machine, plan: AttentionPlan, shape: Shape) -> PlanCost:
    """What one rank's plan costs if nobody keeps it waiting."""
    directions = []
    for backward in (False, True):
        walked = plan.backward if backward and plan.backward is not None else plan
        stages = stage_costs(machine, walked, shape, backward)
        exchange_wire, exchange_copies = exchange_seconds(
            machine, plan.exchange, plan.ring_rank, shape, backward, plan.wide_reduce
        )
        exposed = float((backward_timeline if backward else forward_timeline)(stages, plan.head_chunks))
        stages *= plan.head_chunks
        pulled = sum(stage.pulled for stage in stages)
        compute = sum(stage.compute for stage in stages) + float(disturbed(stages, exposed)) + exchange_copies
        waiting = max(exposed + pulled + exchange_wire, _host(machine, walked, backward) - compute)
        wire = sum(stage.cast + stage.reduce for stage in stages) + pulled + exchange_wire
        directions.append(DirectionCost(compute, wire, waiting))
    return PlanCost(directions[0], directions[1], buffer_bytes(plan, shape))


def plan_cost(machine: Machine, plans: Sequence[AttentionPlan], shape: Shape) -> PlanCost:
    """What an attention costs over all its ranks: of each direction the slowest rank, and the most memory."""
    costs = [rank_cost(machine, plan, shape) for plan in plans]
    return PlanCost(
        max((cost.forward for cost in costs), key=lambda cost: cost.seconds),
        max((cost.backward for cost in costs), key=lambda cost: cost.seconds),
        max(cost.buffer_bytes for cost in costs),
    )


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


def _host(machine: Machine, plan: AttentionPlan, backward: bool) -> float:
    stages = plan.stages * plan.head_chunks
    later = len(stages) - plan.head_chunks
    return float(
        host_seconds(
            machine,
            calls=sum(len(stage.calls) for stage in stages),
            casts=0 if backward and plan.keep_keys else later,
            reduces=later if backward else 0,
            exchanged=plan.exchange is not None,
            messages=sum(len(stage.sends) + len(stage.receives) for stage in stages),
            backward=backward,
        )
    )


def disturbed(stages: Sequence[StageCost], exposed: Any) -> Any:
    """Seconds that kernels lose by the transfers beside them: all but those that they wait for."""
    wire = sum(stage.cast + stage.reduce for stage in stages)
    return sum(stage.lost for stage in stages) * (1 - np.minimum(exposed / np.maximum(wire, 1e-12), 1.0))


def forward_timeline(stages: Sequence[StageCost], chunks: int = 1) -> Any:
    """Seconds that the kernels wait: each cast is posted when the keys before it are there.

    The fields of the stages may be arrays, of many ranks at once.

    Arguments:
        stages: of each of so many chunks of heads.
    """
    now: Any = 0.0
    waited: Any = 0.0
    casts = iter([stage.cast for stage in stages[1:]] * chunks)
    arrival: Any = next(casts, 0.0)
    for number, stage in [*enumerate(stages)] * chunks:
        if number:
            waited = waited + np.maximum(0.0, arrival - now)
            now = np.maximum(now, arrival)
            arrival = now + next(casts, 0.0)
        now = now + stage.compute
    return waited


def backward_timeline(stages: Sequence[StageCost], chunks: int = 1) -> Any:
    """Seconds that the kernels wait: nothing hides the first cast, and the local stage hides the last reduce.

    Casts and reduces share one wire, in the order in which the executor posts them. Arguments as in `forward_timeline`.
    """
    now: Any = 0.0
    waited: Any = 0.0
    local, *later = stages
    casts = iter([stage.cast for stage in later] * chunks)
    arrival = wire_free = next(casts, 0.0)
    for _ in range(chunks):
        returned: Any = 0.0
        for stage in later:
            waited = waited + np.maximum(0.0, arrival - now)
            now = np.maximum(now, arrival)
            cast = next(casts, None)
            if cast is not None:
                arrival = wire_free = np.maximum(now, wire_free) + cast
            now = now + stage.compute
            waited = waited + np.maximum(0.0, returned - now)
            now = np.maximum(now, returned)
            returned = wire_free = np.maximum(now, wire_free) + stage.reduce
        now = now + local.compute
        waited = waited + np.maximum(0.0, returned - now)
        now = np.maximum(now, returned)
    return waited
