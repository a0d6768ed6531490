"""Ring × ulysses for a batch, or for each of its documents: what is predicted to take the least time.

Every rank prices all degrees from the same integers, so that all come to the same choice without communication.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ringattn.mask import Mask
from ringattn.parallel.choice.mixture import Mixer
from ringattn.parallel.choice.schedule import choose
from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.mesh.shape import MeshShape
from ringattn.parallel.placement.parts import Parts
from ringattn.parallel.placement.placement import Placement
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.pricing.pricer import Pricer
from ringattn.parallel.pricing.setting import PriceInputs
from ringattn.parallel.schedules.candidates import candidates

# Higher ulysses degrees need less memory and cut no documents: fewer must be faster by this much to be taken.
RING_AXIS_GAIN = 0.01
# Two attentions in one are predicted less surely than one.
MIXTURE_GAIN = 0.01


@dataclass(frozen=True)
class Degrees:
    """The placements that were chosen, one or several of different documents, and why."""

    parts: tuple[Placement, ...]
    seconds: float
    reason: str


def choose_degrees(
    meshes: Sequence[MeshShape],
    placed_on: Callable[[MeshShape], Placement],
    masks: Sequence[tuple[Mask, float]],
    shape: Shape,
    machine: Machine | None = None,
    parted: Callable[[Parts], tuple[Placement, ...]] | None = None,
) -> Degrees:
    """The best of `meshes`, which are ways to part the same ranks, or a mixture of two of them.

    Arguments:
        placed_on: the placement of the batch on a mesh.
        masks: with the number of layers that each has.
        machine: whose speed is predicted; default: each mesh's own, since not all may move data alike.
        parted: the placements of the batch in parts; without, all documents are on one mesh.
    """
    priced = []
    for mesh in sorted(meshes, key=lambda mesh: -mesh.ulysses):
        if mesh.ulysses <= shape.query_heads:
            placement = placed_on(mesh)
            priced.append((attention_seconds(placement, masks, shape, mesh.planned_for(machine)), placement))
    seconds, best = priced[0]
    for other_seconds, other in priced[1:]:
        if other_seconds < (1 - RING_AXIS_GAIN) * seconds:
            seconds, best = other_seconds, other
    told = [
        f"{placement.mesh.ring} × {placement.mesh.ulysses} {took * 1e3:.3f} ms"
        for took, placement in sorted(priced, key=lambda pair: pair[0])
    ]
    parts: tuple[Placement, ...] = (best,)
    chosen = f"ring {best.mesh.ring} × ulysses {best.mesh.ulysses}"
    if parted is not None and len(priced) > 1:
        inner, outer = priced[0][1].mesh, priced[-1][1].mesh
        mixer = Mixer(best.docs, inner, outer, parted, masks, shape, machine)
        mixture = mixer.best((1 - MIXTURE_GAIN) * min(took for took, _ in priced))
        if mixture is not None:
            seconds, parts = mixture.seconds, mixture.parts
            chosen = _described(parts)
            told.insert(0, f"both {mixture.seconds * 1e3:.3f} ms")
    on = parts[0].mesh.planned_for(machine)
    reason = f"{chosen} of {', '.join(told)}, forward and backward of all masks; predicted for {on}"
    return Degrees(parts, seconds, reason)


def _described(parts: tuple[Placement, ...]) -> str:
    exchanged, others = parts
    longest = len(exchanged.docs)
    return (
        f"the longest {f'{longest} documents' if longest > 1 else 'document'} (of {min(exchanged.docs.lengths)} tokens "
        f"and more) on ring {exchanged.mesh.ring} × ulysses {exchanged.mesh.ulysses}, the other {len(others.docs)} on "
        f"ring {others.mesh.ring} × ulysses {others.mesh.ulysses}:"
    )


def attention_seconds(
    placement: Placement, masks: Sequence[tuple[Mask, float]], shape: Shape, machine: Machine
) -> float:
    """Forward and backward of all layers by the fastest schedules."""
    options = candidates(placement.mesh.ring, "auto", None, placement.docs.segmented)
    total = 0.0
    for mask, layers in masks:
        pricer = Pricer.of(placement, mask, PriceInputs(machine, shape))
        total += layers * choose(pricer, options, None).cost.total
    return total
