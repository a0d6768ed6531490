"""The plans of all ranks in one process: to print, draw and simulate what every rank of a job will do."""

from dataclasses import replace

from ringattn.mask import Mask
from ringattn.parallel.placement.placement import Placement
from ringattn.parallel.plan.plan import AttentionPlan
from ringattn.parallel.planning.options import check_heads, check_scheme
from ringattn.parallel.planning.planner import chosen, only, plan_exchange, settled
from ringattn.parallel.pricing.setting import PriceInputs
from ringattn.parallel.schedules.candidates import candidates
from ringattn.parallel.schedules.schedule import Schedule


def plan_group(
    placement: Placement,
    mask: Mask,
    setting: PriceInputs,
    scheme: str = "auto",
    stages: int | None = None,
    memory_limit: int | None = None,
    head_groups: int | None = None,
    head_chunks: int | None = None,
) -> list[AttentionPlan]:
    """What `plan_attention` plans on each sequence rank of one part of a layout, by rank.

    The pieces are looked up and the schedule is chosen once for all; ulysses ranks of a position share its stages.
    """
    mesh = placement.mesh
    check_scheme(scheme, mesh, stages)
    check_heads(head_groups, head_chunks)
    options = candidates(mesh.ring, scheme, stages)
    pricer, choice = chosen(placement, mask, setting, options, memory_limit, head_chunks)

    def planned(position: int, one: Schedule) -> AttentionPlan:
        return settled(one.plan(pricer.demand, position), pricer.setting, choice.keep_keys)

    plans = []
    for position in range(mesh.ring):
        forward = planned(position, choice.forward)
        backward = None if choice.backward == choice.forward else planned(position, choice.backward)
        for rank in range(mesh.ulysses):
            exchange, why = plan_exchange(placement, pricer.setting, position, rank, forward, head_groups)
            last = None if backward is None else replace(backward, exchange=exchange)
            reason = only(mesh, options) + choice.reason + why
            plans.append(replace(forward, exchange=exchange, backward=last, reason=reason))
    return plans
