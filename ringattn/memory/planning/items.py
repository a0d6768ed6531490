"""Named bytes, and the moments of a step at which they are alive together."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Items = Mapping[str, int]

# What is alive, in the order in which tables and pictures have it.
WEIGHTS = "weights"
MOMENTS = "optimizer's moments"
GRADIENTS = "gradients"
GATHERED = "gathered weights"
REDUCING = "gradients being reduced"
KEPT = "kept by layers"
STREAM = "hidden states"
NORMS = "norms"
ATTENTION = "attention"
RECURRENCE = "recurrence"
MLP = "MLP"
ROUTERS = "logits of routers"
HEAD = "logits and loss"
MOVING = "to and from the host"
STEP = "optimizer's step"
INPUTS = "inputs and rotary tables"
WORKSPACE = "workspaces of libraries"
ITEMS = (
    WEIGHTS, MOMENTS, GRADIENTS, GATHERED, REDUCING, KEPT, STREAM, NORMS, ATTENTION, RECURRENCE, MLP, ROUTERS,
    HEAD, MOVING, STEP, INPUTS, WORKSPACE,
)  # fmt: skip
FORWARD, BACKWARD, UPDATE = "forward", "backward", "step"
PHASES = (FORWARD, BACKWARD, UPDATE)


@dataclass(frozen=True)
class Moment:
    """A moment of a step.

    Arguments:
        phase: "forward", "backward" or "step".
        name: what is computed then.
        items: bytes by what they are of.
    """

    phase: str
    name: str
    items: Items

    @property
    def total(self) -> int:
        return sum(self.items.values())


def together(*parts: Items) -> dict[str, int]:
    """All of them at once; what is of the same is added, and nothing is left out."""
    out: dict[str, int] = {}
    for part in parts:
        for name, size in part.items():
            out[name] = out.get(name, 0) + size
    return {name: out[name] for name in ITEMS if out.get(name)}


def largest(moments: Iterable[Moment]) -> Moment:
    """The one with the most bytes."""
    return max(moments, key=lambda moment: moment.total)
