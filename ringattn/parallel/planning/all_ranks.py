"""The plans of all ranks in one process: to print, draw and simulate what every rank of a job will do."""

from dataclasses import replace

from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.placement.placement import Placement
from ringattn.parallel.plan.plan import AttentionPlan
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.options import check_scheme
from ringattn.parallel.planning.planner import chosen, plan_exchange, settled
from ringattn.parallel.schedules.schedule import Schedule
from ringattn.settings import AttentionOptions


def plan_group(
    placement: Placement, shape: Shape, options: AttentionOptions = AttentionOptions(), machine: Machine | None = None
) -> list[AttentionPlan]:
    """What `plan_attention` plans on each sequence rank of one part of a layout, by rank.

    The pieces are looked up and the schedule is chosen once for all; ulysses ranks of a position share its stages.
    """
    mesh = placement.mesh
    check_scheme(options, mesh)
    pricer, choice = chosen(placement, shape, options, machine)

    def planned(position: int, one: Schedule) -> AttentionPlan:
        return settled(one.plan(pricer.demand, position), pricer.setting, choice.keep_keys)

    plans = []
    for position in range(mesh.ring):
        forward = planned(position, choice.forward)
        backward = None if choice.backward == choice.forward else planned(position, choice.backward)
        for rank in range(mesh.ulysses):
            exchange, why = plan_exchange(placement, pricer.setting, position, rank, forward, options.head_groups)
            last = None if backward is None else replace(backward, exchange=exchange)
            plans.append(replace(forward, exchange=exchange, backward=last, reason=choice.reason + why))
    return plans
