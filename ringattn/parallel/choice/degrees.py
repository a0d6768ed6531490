"""Ring × ulysses for a batch, or for each of its documents: what is predicted to take the least time.

Every rank prices all degrees from the same integers, so that all come to the same choice without communication.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ringattn.mask import Mask
from ringattn.parallel.choice.mixture import Mixer
from ringattn.parallel.choice.schedule import choose
from ringattn.parallel.layout import Layout
from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.mesh.shape import MeshShape
from ringattn.parallel.placement.parts import Parts
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.pricing.pricer import Pricer
from ringattn.parallel.pricing.setting import Setting
from ringattn.parallel.schedules.schedule import candidates

# Higher ulysses degrees need less memory and cut no documents: fewer must be faster by this much to be taken.
RING_AXIS_GAIN = 0.01
# Two attentions in one are predicted less surely than one.
MIXTURE_GAIN = 0.01


@dataclass(frozen=True)
class Degrees:
    """The layout on the mesh that was chosen, and why."""

    layout: Layout
    seconds: float
    reason: str


def choose_degrees(
    meshes: Sequence[MeshShape],
    layout_on: Callable[[MeshShape], Layout],
    masks: Sequence[tuple[Mask, float]],
    shape: Shape,
    machine: Machine | None = None,
    parted: Callable[[Parts], Layout] | None = None,
) -> Degrees:
    """The best of `meshes`, which are ways to part the same ranks, or a mixture of two of them.

    Arguments:
        layout_on: the layout of the batch on a mesh.
        masks: with the number of layers that each has.
        machine: whose speed is predicted; default: each mesh's own, since not all may move data alike.
        parted: the layout of the batch in parts; without, all documents are on one mesh.
    """
    priced = []
    for mesh in sorted(meshes, key=lambda mesh: -mesh.ulysses):
        if mesh.ulysses <= shape.query_heads:
            layout = layout_on(mesh)
            priced.append((_seconds(layout, masks, shape, mesh.planned_for(machine)), layout))
    best = priced[0]
    for seconds, layout in priced[1:]:
        if seconds < (1 - RING_AXIS_GAIN) * best[0]:
            best = seconds, layout
    told = [
        f"{layout.mesh.ring} × {layout.mesh.ulysses} {seconds * 1e3:.3f} ms"
        for seconds, layout in sorted(priced, key=lambda pair: pair[0])
    ]
    chosen = f"ring {best[1].mesh.ring} × ulysses {best[1].mesh.ulysses}"
    if parted is not None and len(priced) > 1:
        inner, outer = priced[0][1].mesh, priced[-1][1].mesh
        mixer = Mixer(best[1].docs, inner, outer, parted, masks, shape, machine)
        mixture = mixer.best((1 - MIXTURE_GAIN) * min(seconds for seconds, _ in priced))
        if mixture is not None:
            best = mixture.seconds, mixture.layout
            chosen = _described(mixture.layout)
            told.insert(0, f"both {mixture.seconds * 1e3:.3f} ms")
    on = best[1].mesh.planned_for(machine)
    reason = f"{chosen} of {', '.join(told)}, forward and backward of all masks; predicted for {on}"
    return Degrees(best[1], best[0], reason)


def _described(layout: Layout) -> str:
    exchanged, others = layout.parts
    longest = len(exchanged.docs)
    return (
        f"the longest {f'{longest} documents' if longest > 1 else 'document'} (of {min(exchanged.docs.lengths)} tokens "
        f"and more) on ring {exchanged.mesh.ring} × ulysses {exchanged.mesh.ulysses}, the other {len(others.docs)} on "
        f"ring {others.mesh.ring} × ulysses {others.mesh.ulysses}:"
    )


def _seconds(layout: Layout, masks: Sequence[tuple[Mask, float]], shape: Shape, machine: Machine) -> float:
    options = candidates(layout.mesh.ring, "auto", None)
    total = 0.0
    for mask, layers in masks:
        pricer = Pricer.of(layout, mask, Setting(machine, shape))
        total += layers * choose(pricer, options, None).cost.total
    return total
