"""Which layout a model with states should have: what its attention and its recurrences take on each, by their number.

A recurrence costs the same for every token, so any layout with equal tokens balances it. What it pays for is cuts: each
cut piece has a map to compute and to send. Attention pays for documents that are long, and is balanced by cutting them.
So a batch of a model with few attention layers may be faster on runs of the stream, which cut one document at each
seam, than on a balanced layout. Every rank weighs the same integers and comes to the same layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ringattn.documents import Documents
from ringattn.mask import Mask
from ringattn.parallel.choice.degrees import attention_seconds
from ringattn.parallel.layout import Layout
from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.mesh.shape import MeshShape
from ringattn.parallel.plan.shape import Shape
from ringattn.recurrent.plan import check_layout
from ringattn.recurrent.price import RecurrenceShape, kernel_seconds, prices

GAIN = 0.01  # by as much runs of the stream must be faster than a balanced layout
ITEMSIZE = 2  # prices are those of bfloat16


@dataclass(frozen=True)
class MixingLayers:
    """The layers of a model that look at more than one token, with the number of each.

    Arguments:
        masks: of attention layers.
        states: heads and dims of layers that carry a state.
        heads: query and key heads of attention.
        head_dim: of attention.

    Raises ValueError if there are none, or a number is not positive.
    """

    masks: tuple[tuple[Mask, float], ...] = ()
    states: tuple[tuple[RecurrenceShape, float], ...] = ()
    heads: tuple[int, int] = (32, 8)
    head_dim: int = 128

    def __post_init__(self) -> None:
        counts = [count for _, count in (*self.masks, *self.states)]
        if not counts or min(counts) <= 0:
            raise ValueError(f"masks and states must have a positive number of layers each, got {counts}")


@dataclass(frozen=True)
class Weighed:
    """The layout that was chosen, and the predicted seconds of all these layers in both passes."""

    layout: Layout
    seconds: float

    @property
    def reason(self) -> str:
        """Why this one; the layout says it too."""
        return self.layout.reason


def weighed_layout(
    docs: Documents, mesh: MeshShape, policy: str = "auto", layers: MixingLayers | None = None
) -> Layout:
    """The layout of a model's batch: with policy="auto" that of `weigh`, where there is a choice.

    Arguments:
        layers: of the model; None: attention alone is weighed, as for models without states.
    """
    choice = mesh.ring > 1 or mesh.alternatives
    if policy != "auto" or layers is None or not choice:
        return Layout(docs, mesh, policy)
    return weigh(docs, mesh, layers).layout


def weigh(docs: Documents, mesh: MeshShape, layers: MixingLayers, machine: Machine | None = None) -> Weighed:
    """The fastest of balanced layouts and runs of the stream, on the mesh or each of its alternatives. No
    communication; exact whatever is chosen.

    Arguments:
        machine: whose speed is predicted; default: the mesh's.

    Raises NotImplementedError for documents that are trees, where there are states.
    """
    found = []
    fitting = [one for one in mesh.alternatives if not layers.masks or one.ulysses <= layers.heads[0]]
    for one in fitting or (mesh,):
        for policy in ("auto", "contiguous") if one.ring > 1 else ("contiguous",):
            layout = Layout(docs, one, policy, layers.masks or None, machine=machine, head_dim=layers.head_dim)
            found.append((seconds_of(layout, layers, machine), layout))
    # Those that cut fewer documents must be faster by more than a prediction is off.
    seconds, layout = min(found, key=lambda pair: pair[0] * (1 + GAIN * (_runs(pair[1]))))
    told = ", ".join(f"{_name(other)} {took * 1e3:.3f} ms" for took, other in sorted(found, key=lambda pair: pair[0]))
    on = layout.mesh.planned_for(machine)
    what = f"{_counted(layers.masks)} attention and {_counted(layers.states)} recurrent layers"
    layout.reason = f"{_name(layout)} of {told}, {what}, forward and backward; predicted for {on}"
    return Weighed(layout, seconds)


def seconds_of(layout: Layout, layers: MixingLayers, machine: Machine | None = None) -> float:
    """What these layers take on a layout of one part, on its slowest rank, forward and backward."""
    machine = layout.mesh.planned_for(machine)
    total = 0.0
    if layers.masks:
        shape = Shape(*layers.heads, layers.head_dim, layers.head_dim, ITEMSIZE)
        total += attention_seconds(layout.parts[0], layers.masks, shape, machine)
    if layers.states:
        check_layout(layout)
    rows = max(layout.tokens(rank) for rank in range(layout.mesh.sequence_size))
    for rule, count in layers.states:
        beside = min(price.seconds for price in prices(layout, rule, machine))
        total += count * (3 * kernel_seconds(rule, rows, machine) + beside)
    return total


def _runs(layout: Layout) -> bool:
    return layout.mesh.ring > 1 and layout.policy == "contiguous"


def _name(layout: Layout) -> str:
    return f"{layout.resolved_policy} on ring {layout.mesh.ring} × ulysses {layout.mesh.ulysses}"


def _counted(layers: Sequence[tuple[object, float]]) -> str:
    return f"{sum(count for _, count in layers):g}"
