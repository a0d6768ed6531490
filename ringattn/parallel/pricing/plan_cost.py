"""What a plan costs on a machine: seconds of kernels, copies and wire, and what of the wire no kernel hides. Pure.

The executor's order is played through for one rank: a cast travels while the stage before it is computed, and so does
the reduce of a stage in the backward pass; the exchange of heads stands before and after. Ranks are priced one by one,
as if nobody waited for another; the slowest decides.
"""

from collections.abc import Sequence
from typing import Any

from ringattn.parallel.geometry.block_table import BlockTable
from ringattn.parallel.machine.machine import Machine, copy_seconds, merge_seconds
from ringattn.parallel.plan.plan import AttentionPlan, Stage
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.pricing.kernel_times import calls_seconds
from ringattn.parallel.pricing.memory import buffer_bytes
from ringattn.parallel.pricing.timeline import (
    DirectionCost,
    PlanCost,
    StageCost,
    backward_timeline,
    disturbed,
    forward_timeline,
)
from ringattn.parallel.pricing.wire import _rows_by_class, _Wire, _wire, exchange_seconds

# A backward pass and its calls, in those of a forward pass: by eye, of hist16k on 2 GPUs with FlashAttention 4.
BACKWARD_HOST = 1.7


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
