"""What a run does about memory, as two records: of what is alive in a step, and of the states that live between steps.

Each field is a key of the recipe's `memory` group under the same name.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Keep = Literal["all", "selective", "attention", "layer"]
Float = Literal["float32", "bfloat16"]
Moments = Literal["float32", "bfloat16", "int8"]
Place = Literal["device", "host"]


@dataclass(frozen=True)
class MemorySettings:
    """What is alive within a step. Every setting gives the same loss and gradients.

    Arguments:
        loss_tile: tokens whose logits are alive at a time; None: all of a rank.
        mlp_tile: tokens that an MLP computes at a time; None: all of a rank.
        keep: what a layer keeps for its backward pass. "all": what autograd saves; "selective": its input, attention's
            output, and the products that are cheap to keep; "attention": its input and attention's output; "layer": its
            input.
        every: layers from one kept input to the next; those between are computed again from it. Only with keep="layer"
            or "attention".
        host_layers: so many layers, from the first one, keep their share in host memory.
        host_bytes: of pinned host memory for these.

    Raises ValueError naming the field.
    """

    loss_tile: int | None = None
    mlp_tile: int | None = None
    keep: Keep = "all"
    every: int = 1
    host_layers: int = 0
    host_bytes: int = 0

    def __post_init__(self) -> None:
        for name, least in (("loss_tile", 1), ("mlp_tile", 1), ("every", 1), ("host_layers", 0), ("host_bytes", 0)):
            value = getattr(self, name)
            if value is None and name.endswith("tile"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        _check_choices(self)
        if self.keep == "all" and self.host_layers:
            raise ValueError(
                f'host_layers={self.host_layers} move what a layer keeps, and with keep="all" that is too much to '
                'move: use keep="attention" or "layer"'
            )
        if self.every > 1 and self.keep not in ("attention", "layer"):
            raise ValueError(f'every={self.every} needs keep="layer" or "attention", got keep={self.keep!r}')
        if self.host_layers and not self.host_bytes:
            raise ValueError(f"host_layers={self.host_layers} need host_bytes of host memory, got 0")


@dataclass(frozen=True)
class StateSettings:
    """What lives between steps: weights, their gradients and the optimizer's moments, and how weights are gathered.

    Arguments:
        weights: dtype in which weights (and the gradients of a rank's shards) are held. "bfloat16" weights are rounded
            by chance after each step, so that small updates are not lost on average.
        moments: dtype of the optimizer's two moments.
        reduce: dtype in which gradients are added up over ranks.
        states_on: where all of these wait between uses, and where the optimizer computes.
        reshard: whether a layer's gathered weights are let go after its forward pass and gathered again for its
            backward pass.
        prefetch: layers whose weights are gathered ahead of their use.

    Raises ValueError naming the field.
    """

    weights: Float = "float32"
    moments: Moments = "float32"
    reduce: Float = "float32"
    states_on: Place = "device"
    reshard: bool = True
    prefetch: int = 1

    def __post_init__(self) -> None:
        _check_choices(self)
        if not isinstance(self.reshard, bool):
            raise ValueError(f"reshard must be True or False, got {self.reshard!r}")
        if not isinstance(self.prefetch, int) or isinstance(self.prefetch, bool) or self.prefetch < 0:
            raise ValueError(f"prefetch must be an integer of at least 0, got {self.prefetch!r}")


CHOICES: dict[str, tuple[str, ...]] = {
    "keep": get_args(Keep),
    "weights": get_args(Float),
    "moments": get_args(Moments),
    "reduce": get_args(Float),
    "states_on": get_args(Place),
}


def _check_choices(settings: Any) -> None:
    for field in fields(settings):
        allowed = CHOICES.get(field.name)
        if allowed is not None and (value := getattr(settings, field.name)) not in allowed:
            raise ValueError(f"{field.name} must be one of {', '.join(allowed)}, got {value!r}")
