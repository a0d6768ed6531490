"""From layout and mask to plan. Every rank computes its part from the same integers, without communication."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from ringattn.kept import kept
from ringattn.kernels.spec import Range
from ringattn.parallel.choice.heads import choose_groups, chunk_counts
from ringattn.parallel.choice.schedule import GAIN, Choice, choose
from ringattn.parallel.layout import Layout
from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.placement.placement import Placement
from ringattn.parallel.plan.exchange import Exchange, exchange_plan
from ringattn.parallel.plan.plan import AttentionPlan, PartedPlan
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.options import check_scheme
from ringattn.parallel.pricing.price import most_bytes
from ringattn.parallel.pricing.pricer import Pricer
from ringattn.parallel.pricing.setting import PriceInputs
from ringattn.parallel.schedules.candidates import candidates
from ringattn.settings import AttentionOptions


class PlansKey(NamedTuple):
    """By what the plans of an attention are kept with their layout."""

    options: AttentionOptions  # for planning
    shape: Shape
    machines: tuple[str, ...]  # digests of those of the parts


def plan_parts(
    layout: Layout, shape: Shape, options: AttentionOptions = AttentionOptions(), machine: Machine | None = None
) -> PartedPlan:
    """What this rank does for one attention; kept with the layout, since every layer asks for the same.

    Arguments:
        layout: with several parts or, as one, without.
        shape: heads and dims of the model.
        options: of which plans depend on `mask`, `scheme`, `stages`, `keep_keys`, `wide_reduce`, `memory_limit`,
            `head_groups` and `head_chunks`, as `parallel_attention` describes them. A parted layout has only the scheme
            "auto", and all its parts together keep the memory limit, by the estimate for all ranks.
        machine: whose speed is predicted, the same on all ranks; default: the mesh's (of each part, its own),
            else the shipped H200.

    Raises ValueError naming the argument, with the numbers; on every rank or on none.
    """
    check_scheme(options, layout.mesh, len(layout.parts))
    wanted = options.for_planning()
    machines = tuple(part.mesh.planned_for(machine).digest for part in layout.parts)
    return kept(
        layout,
        PlansKey(wanted, shape, machines),
        lambda: PartedPlan(tuple(_plans(layout, shape, wanted, machine))),
    )


def plan_attention(
    layout: Layout, shape: Shape, options: AttentionOptions = AttentionOptions(), machine: Machine | None = None
) -> AttentionPlan:
    """The plan of this rank for one attention on a layout that is not parted; the arguments are those of `plan_parts`.

    Raises ValueError naming the argument, with the numbers; on every rank or on none.
    """
    if len(layout.parts) > 1:
        raise ValueError(f"layout must not be parted: plan_parts plans each of its {len(layout.parts)} parts")
    return plan_parts(layout, shape, options, machine).parts[0][1]


def _plans(
    layout: Layout, shape: Shape, options: AttentionOptions, machine: Machine | None
) -> Iterator[tuple[Range, AttentionPlan]]:
    """The plan of each part with its rows."""
    row, limit = 0, options.memory_limit
    for part in layout.parts:
        left = options._replace(memory_limit=limit)
        try:
            plan, taken = _plan(part, shape, part_options(layout, part, left), machine)
        except ValueError as error:
            if not row:
                raise
            raise ValueError(f"memory_limit={options.memory_limit} for all parts: {error}") from None
        limit = None if limit is None else limit - taken
        tokens = part.tokens(part.mesh.sequence_rank)
        yield (row, row + tokens), plan
        row += tokens


def _plan(
    placement: Placement, shape: Shape, options: AttentionOptions, machine: Machine | None
) -> tuple[AttentionPlan, int]:
    """The plan of this rank, and the bytes that the buffers of any rank take at most."""
    mesh = placement.mesh
    pricer, choice = chosen(placement, shape, options, machine)
    plans = [one.plan(pricer.demand, mesh.ring_rank) for one in dict.fromkeys((choice.forward, choice.backward))]
    exchange, why = plan_exchange(
        placement, pricer.setting, mesh.ring_rank, mesh.ulysses_rank, plans[0], options.head_groups
    )
    plans = [replace(settled(plan, pricer.setting, choice.keep_keys), exchange=exchange) for plan in plans]
    backward = plans[1] if len(plans) > 1 else None
    return replace(plans[0], backward=backward, reason=choice.reason + why), choice.cost.buffer_bytes


def chosen(
    placement: Placement, shape: Shape, options: AttentionOptions, machine: Machine | None = None
) -> tuple[Pricer, Choice]:
    """The best schedules that the options leave and that keep the memory limit, and the prices they were chosen by.

    Heads are in the fewest chunks that are predicted to be nearly as fast as any.
    """
    mesh, limit = placement.mesh, options.memory_limit
    schedules = candidates(mesh.ring, options.scheme, options.stages, placement.docs.segmented)
    setting = PriceInputs(
        mesh.planned_for(machine), shape, keep_keys=options.keep_keys, wide_reduce=options.wide_reduce
    )
    found: list[tuple[Pricer, Choice]] = []
    error = ValueError()
    for chunks in chunk_counts(setting.on(placement), options.head_chunks, limit):
        pricer = Pricer.of(placement, options.mask, replace(setting, head_chunks=chunks))
        try:
            found.append((pricer, choose(pricer, schedules, limit)))
        except ValueError as refused:
            error = refused
        if limit is None or all(most_bytes(pricer.price(schedule)) <= limit for schedule in schedules):
            break  # more of them would save what nobody lacks
    if not found:
        raise error
    fastest = min(choice.cost.total for _, choice in found)
    pricer, choice = next(pair for pair in found if pair[1].cost.total * (1 - GAIN) <= fastest)
    only = f"only {schedules[0].name} was considered: " if len(schedules) == 1 and mesh.ring > 1 else ""
    told = chunks_told(pricer.setting.head_chunks, options.head_chunks)
    return pricer, replace(choice, reason=only + choice.reason + told)


def chunks_told(chunks: int, asked: int | None) -> str:
    """The end of a reason."""
    told = f"; heads in {chunks} chunks, one after another" if chunks > 1 else ""
    if asked is None or asked == chunks:
        return told
    return f"{told}; not in {asked}, as key heads do not part equally into so many, or are copied and summed together"


def settled(plan: AttentionPlan, setting: PriceInputs, keep_keys: bool) -> AttentionPlan:
    """The stages of a plan with what the setting says of how they are walked and their data travels, and whether keys
    are kept."""
    return replace(
        plan,
        head_chunks=setting.head_chunks,
        keep_keys=keep_keys,
        wide_reduce=setting.wide_reduce,
        engines=setting.machine.engines,
    )


def plan_exchange(
    placement: Placement, setting: PriceInputs, position: int, rank: int, plan: AttentionPlan, head_groups: int | None
) -> tuple[Exchange | None, str]:
    """The exchange of an ulysses rank of a position with the stages of `plan`, and why in so many groups."""
    if setting.exchange is None:
        return None, ""
    heads = setting.shape.query_heads, setting.shape.key_heads
    if placement.mesh.ring > 1 or setting.head_chunks > 1:  # every group would cast its keys anew, or its chunks
        return exchange_plan(placement.deal(position), *heads, rank), ""
    groups, why = choose_groups(setting, plan.stages[0].calls, head_groups)
    return exchange_plan(placement.deal(position), *heads, rank, groups), f"; {why}"


def part_options(layout: Layout, part: Placement, options: AttentionOptions) -> AttentionOptions:
    """What is left of the options to a part of `layout`, or to the whole of it.

    What a part waits for travels under the kernels of the others, so that nothing is faster than a gather, and it is
    the most accurate; but it may need too much memory. An exchange travels under them too: its heads need no groups.
    """
    if len(layout.parts) == 1:
        return options
    gathers = part.mesh.ring > 1 and options.memory_limit is None
    scheme = "gather" if gathers else options.scheme
    return options._replace(scheme=scheme, head_groups=options.head_groups or 1)
