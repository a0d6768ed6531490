"""Ring × ulysses for a batch: the degrees whose attention is predicted to take the least time.

Every rank prices all degrees from the same integers, so that all come to the same choice without communication.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ringattn.mask import Mask
from ringattn.parallel.choice import candidates, choose
from ringattn.parallel.cost import Machine
from ringattn.parallel.demand import Demand
from ringattn.parallel.held import Held
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh import MeshShape
from ringattn.parallel.plan import Shape
from ringattn.parallel.pricing import Setting
from ringattn.parallel.ulysses import exchange_plan

# Higher ulysses degrees need less memory and cut no documents: fewer must be faster by this much to be taken.
RING_AXIS_GAIN = 0.01


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
    machine: Machine,
) -> Degrees:
    """The best of `meshes`, which are ways to part the same ranks.

    Arguments:
        layout_on: the layout of the batch on a mesh.
        masks: with the number of layers that each has.
    """
    priced = []
    for mesh in sorted(meshes, key=lambda mesh: -mesh.ulysses):
        if mesh.ulysses <= shape.query_heads:
            layout = layout_on(mesh)
            priced.append((_seconds(layout, masks, shape, machine), layout))
    best = priced[0]
    for seconds, layout in priced[1:]:
        if seconds < (1 - RING_AXIS_GAIN) * best[0]:
            best = seconds, layout
    told = ", ".join(
        f"{layout.mesh.ring} × {layout.mesh.ulysses} {seconds * 1e3:.3f} ms"
        for seconds, layout in sorted(priced, key=lambda pair: pair[0])
    )
    chosen = best[1].mesh
    reason = f"ring {chosen.ring} × ulysses {chosen.ulysses} of {told}, forward and backward of all masks"
    return Degrees(best[1], best[0], f"{reason}; predicted for {machine}")


def _seconds(layout: Layout, masks: Sequence[tuple[Mask, float]], shape: Shape, machine: Machine) -> float:
    mesh = layout.mesh
    exchange = None
    if mesh.ulysses > 1:
        exchange = exchange_plan(layout.deal(0), shape.query_heads, shape.key_heads, 0)
    setting = Setting(machine=machine, shape=shape, exchange=exchange)
    total = 0.0
    for mask, layers in masks:
        demand = Demand.of(Held.of(layout, mask), mask.band)
        total += layers * choose(demand, setting, candidates(mesh.ring, "auto", None), None).cost.total
    return total
