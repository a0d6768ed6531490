"""What plans cost on a machine: seconds of kernels, copies and wire, and what of the wire no kernel hides. Pure.

Ranks are priced one by one, as if nobody waited for another; the slowest decides.
"""

from collections.abc import Sequence

from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.plan.plan import AttentionPlan
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.pricing.exchange_times import exchange_times
from ringattn.parallel.pricing.memory import buffer_bytes
from ringattn.parallel.pricing.pass_times import pass_times, stage_cost
from ringattn.parallel.pricing.timeline import DirectionCost, PlanCost, StageCost
from ringattn.parallel.schedules.stage_work import StageWork


def stage_costs(machine: Machine, plan: AttentionPlan, shape: Shape, backward: bool) -> list[StageCost]:
    """The stages of a rank's plan, in the order of the plan, without the exchange; for one chunk of heads.

    Arguments:
        shape: the model's; the rank's share of the heads is taken from the plan.
    """
    work = StageWork.of(plan, machine, plan.own(shape), backward)
    return stage_cost(machine, work, plan.keep_keys, plan.wide_reduce).stages


def rank_cost(machine: Machine, plan: AttentionPlan, shape: Shape) -> PlanCost:
    """What one rank's plan costs if nobody keeps it waiting."""
    forward, backward = (_pass_cost(machine, plan, shape, backward) for backward in (False, True))
    return PlanCost(forward, backward, buffer_bytes(plan, shape))


def _pass_cost(machine: Machine, plan: AttentionPlan, shape: Shape, backward: bool) -> DirectionCost:
    walked = plan.for_pass(backward)
    work = StageWork.of(walked, machine, walked.own(shape), backward)
    exchanged = exchange_times(machine, plan.exchange, plan.ring_rank, shape, backward, plan.wide_reduce)
    return pass_times(machine, work, exchanged, plan.head_chunks, walked.keep_keys, walked.wide_reduce).slowest


def plan_cost(machine: Machine, plans: Sequence[AttentionPlan], shape: Shape) -> PlanCost:
    """What an attention costs over all its ranks: of each direction the slowest rank, and the most memory."""
    costs = [rank_cost(machine, plan, shape) for plan in plans]
    return PlanCost(
        max((cost.forward for cost in costs), key=lambda cost: cost.seconds),
        max((cost.backward for cost in costs), key=lambda cost: cost.seconds),
        max(cost.buffer_bytes for cost in costs),
    )
