"""From layout and mask to plan. Every rank computes its part from the same integers, without communication."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Concatenate, ParamSpec

from ringattn.kept import kept
from ringattn.kernels.spec import Range
from ringattn.mask import Mask
from ringattn.parallel.choice.heads import choose_groups, chunk_counts
from ringattn.parallel.choice.schedule import GAIN, Choice, choose
from ringattn.parallel.layout import Layout
from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.mesh.shape import MeshShape
from ringattn.parallel.placement.placement import Placement
from ringattn.parallel.plan.exchange import Exchange, exchange_plan
from ringattn.parallel.plan.plan import AttentionPlan, PartedPlan
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.options import check_heads, check_scheme
from ringattn.parallel.pricing.price import most_bytes
from ringattn.parallel.pricing.pricer import Pricer
from ringattn.parallel.pricing.setting import PriceInputs
from ringattn.parallel.schedules.candidates import candidates
from ringattn.parallel.schedules.schedule import Schedule

P = ParamSpec("P")


def plan_parts(
    layout: Layout,
    mask: Mask,
    query_heads: int,
    key_heads: int,
    scheme: str = "auto",
    stages: int | None = None,
    keep_keys: bool | None = None,
    wide_reduce: bool = True,
    *,
    head_dim: int = 128,
    value_dim: int | None = None,
    itemsize: int = 2,
    memory_limit: int | None = None,
    machine: Machine | None = None,
    head_groups: int | None = None,
    head_chunks: int | None = None,
) -> PartedPlan:
    """What this rank does for one attention; kept with the layout, since every layer asks for the same.

    Arguments:
        layout: with several parts or, as one, without.
        scheme: "gather", "joint" or "ring" name how keys move on the ring axis; "auto" takes what is predicted to be
            fastest, forward and backward apart; "ulysses" and "hybrid" check that the mesh has those axes and leave the
            ring axis to "auto". A parted layout has only "auto".
        stages: number of stages of the ring schedule, the local one included.
        keep_keys, wide_reduce: see `AttentionPlan`; by default keys are kept where that is predicted to be faster and
            they fit: in the memory limit, or without one in half of the q, k, v and out that are kept anyway.
        head_dim, value_dim, itemsize: of queries and keys, of values (default: the same), bytes per element.
        memory_limit: bytes that the buffers of a rank may take, by the estimate for all ranks; of all parts together.
            The message buffers of axes whose data copy engines move are among them (`memory.buffer_bytes`).
        machine: whose speed is predicted, the same on all ranks; default: the mesh's (of each part, its own),
            else the shipped H200.
        head_groups: in how many groups heads are exchanged (with ring = 1), so that one travels while another is
            computed; fewer where heads do not part equally. Default: what is predicted to be fastest.
        head_chunks: see `AttentionPlan`; fewer where key heads do not part equally on every rank, and 1 where copied
            ones are summed in float32. Default: 1, or with a memory limit what is predicted to be fastest of those
            that keep it.

    Raises ValueError naming the argument, with the numbers; on every rank or on none.
    """
    check_scheme(scheme, layout.mesh, stages, len(layout.parts))
    if memory_limit is not None and (not isinstance(memory_limit, int) or memory_limit < 0):
        raise ValueError(f"memory_limit must be None or a number of bytes >= 0, got {memory_limit!r}")
    check_heads(head_groups, head_chunks)
    machines = [part.mesh.planned_for(machine) for part in layout.parts]
    shape = Shape(query_heads, key_heads, head_dim, value_dim or head_dim, itemsize)
    digests = tuple(one.digest for one in machines)
    key = (mask, shape, scheme, stages, keep_keys, wide_reduce, memory_limit, digests, head_groups, head_chunks)

    def make() -> PartedPlan:
        settings = [PriceInputs(one, shape, keep_keys=keep_keys, wide_reduce=wide_reduce) for one in machines]
        return PartedPlan(tuple(_plans(layout, mask, settings, scheme, stages, memory_limit, head_groups, head_chunks)))

    return kept(layout, key, make)


def _whole(plan: Callable[Concatenate[Layout, P], PartedPlan]) -> Callable[Concatenate[Layout, P], AttentionPlan]:
    """The same for layouts that are not parted, whose plan is one."""

    def plan_attention(layout: Layout, *args: P.args, **kwargs: P.kwargs) -> AttentionPlan:
        """The plan of this rank for one attention on a layout that is not parted; the arguments are those of
        `plan_parts`.

        Raises ValueError naming the argument, with the numbers; on every rank or on none.
        """
        if len(layout.parts) > 1:
            raise ValueError(f"layout must not be parted: plan_parts plans each of its {len(layout.parts)} parts")
        return plan(layout, *args, **kwargs).parts[0][1]

    return plan_attention


plan_attention = _whole(plan_parts)


def _plans(
    layout: Layout,
    mask: Mask,
    settings: Sequence[PriceInputs],
    scheme: str,
    stages: int | None,
    memory_limit: int | None,
    head_groups: int | None,
    head_chunks: int | None,
) -> Iterator[tuple[Range, AttentionPlan]]:
    """The plan of each part with its rows."""
    row, left = 0, memory_limit
    head_groups = head_groups or part_groups(layout)
    for part, setting in zip(layout.parts, settings, strict=True):
        options = candidates(part.mesh.ring, part_scheme(layout, part, scheme, left), stages)
        try:
            plan, taken = _plan(part, mask, setting, options, left, head_groups, head_chunks)
        except ValueError as error:
            raise (ValueError(f"memory_limit={memory_limit} for all parts: {error}") if row else error) from None
        left = None if left is None else left - taken
        tokens = part.tokens(part.mesh.sequence_rank)
        yield (row, row + tokens), plan
        row += tokens


def _plan(
    placement: Placement,
    mask: Mask,
    setting: PriceInputs,
    options: Sequence[Schedule],
    memory_limit: int | None,
    head_groups: int | None,
    head_chunks: int | None,
) -> tuple[AttentionPlan, int]:
    """The plan of this rank, and the bytes that the buffers of any rank take at most."""
    mesh = placement.mesh
    pricer, choice = chosen(placement, mask, setting, options, memory_limit, head_chunks)
    plans = [one.plan(pricer.demand, mesh.ring_rank) for one in dict.fromkeys((choice.forward, choice.backward))]
    exchange, why = plan_exchange(placement, pricer.setting, mesh.ring_rank, mesh.ulysses_rank, plans[0], head_groups)
    reason = only(mesh, options) + choice.reason + why
    plans = [replace(settled(plan, pricer.setting, choice.keep_keys), exchange=exchange) for plan in plans]
    backward = plans[1] if len(plans) > 1 else None
    return replace(plans[0], backward=backward, reason=reason), choice.cost.buffer_bytes


def chosen(
    placement: Placement,
    mask: Mask,
    setting: PriceInputs,
    options: Sequence[Schedule],
    memory_limit: int | None,
    head_chunks: int | None,
) -> tuple[Pricer, Choice]:
    """What is best of the options that keep the limit, with heads in the fewest chunks that are predicted to be nearly
    as fast as any; and the prices."""
    found: list[tuple[Pricer, Choice]] = []
    error = ValueError()
    for chunks in chunk_counts(setting.on(placement), head_chunks, memory_limit):
        pricer = Pricer.of(placement, mask, replace(setting, head_chunks=chunks))
        try:
            found.append((pricer, choose(pricer, options, memory_limit)))
        except ValueError as refused:
            error = refused
        if memory_limit is None or all(most_bytes(pricer.price(option)) <= memory_limit for option in options):
            break  # more of them would save what nobody lacks
    if not found:
        raise error
    fastest = min(choice.cost.total for _, choice in found)
    pricer, choice = next(pair for pair in found if pair[1].cost.total * (1 - GAIN) <= fastest)
    return pricer, replace(choice, reason=choice.reason + chunks_told(pricer.setting.head_chunks, head_chunks))


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


def part_scheme(layout: Layout, part: Placement, scheme: str, memory_limit: int | None) -> str:
    """What is left of `scheme` to a part of `layout`, or to the whole of it.

    What a part waits for travels under the kernels of the others, so that nothing is faster than a gather, and it is
    the most accurate; but it may need too much memory.
    """
    return "gather" if len(layout.parts) > 1 and part.mesh.ring > 1 and memory_limit is None else scheme


def part_groups(layout: Layout) -> int | None:
    """Groups of heads where the caller asks for no number: an exchange already travels under other parts' kernels."""
    return 1 if len(layout.parts) > 1 else None


def only(mesh: MeshShape, options: Sequence[Schedule]) -> str:
    """What a plan's reason begins with if there was nothing to choose."""
    return f"only {options[0].name} was considered: " if len(options) == 1 and mesh.ring > 1 else ""
