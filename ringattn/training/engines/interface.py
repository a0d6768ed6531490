"""The contract of an engine, and the one place that picks one by name."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from ringattn.memory.settings import StateSettings
from ringattn.training.checkpoint.saved_state import SavedState
from ringattn.training.model.streamed import StreamedWeights

STATE = "engine"
"""Where in a checkpoint the state of an engine stands."""


@dataclass(frozen=True)
class EngineOptions:
    """What every engine needs to know.

    Arguments:
        empty: builds the model without weights, on the meta device.
        load: builds the same whole, with its first weights, on the CPU; equal on every rank that calls it.
        stream: the same weights piece by piece, or None where that is impossible; left out, `load` makes them.
        attach: installs attention and memory settings in a model, before it is sharded.
        device: where this rank computes.
        dtype: of the computation: torch.float32, or torch.bfloat16 with float32 master weights and reductions.
        weight_decay, betas, eps: of AdamW; norms and biases have no weight decay.
        clip: largest global gradient norm; 0 does not clip.
        micro_steps: backward calls per step.
        zero_stage: DeepSpeed's stage, 1 to 3.
        momentum: of Muon for matrices; None for AdamW alone.
        states: what lives between steps. An engine raises ValueError for what it cannot do.
    """

    empty: Callable[[], nn.Module]
    load: Callable[[], nn.Module]
    attach: Callable[[nn.Module], object]
    device: torch.device
    dtype: torch.dtype
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    clip: float
    micro_steps: int
    zero_stage: int
    momentum: float | None = None
    stream: Callable[[], StreamedWeights | None] | None = None
    states: StateSettings = field(default_factory=StateSettings)


class Engine(Protocol):
    """Holds model and optimiser. All methods are collective over all ranks of data × sequence.

    Gradients are averaged over all ranks; the loss of `ringattn.hf.parallelize` accounts for it.
    """

    model: nn.Module
    """Call it for the forward pass; its parameters may be sharded."""

    num_parameters: int
    """Parameters of the whole model, frozen ones included."""

    goes_back_twice: bool
    """Whether a backward pass that no step follows can be undone by `forget`."""

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of one micro-step."""

    def norm(self) -> torch.Tensor:
        """The global norm of the gradients that are there, a scalar on the device; only where `goes_back_twice`."""

    def forget(self) -> None:
        """Drops what passes since the last step have left."""

    def alike(self) -> dict[str, Any]:
        """What is equal on all ranks between steps, by name: integers, floats, or scalars on the device. No
        collective."""

    def step(self, learning_rate: float) -> torch.Tensor | float:
        """Clips, steps, clears the gradients; returns the global gradient norm before clipping.

        Where the norm is not finite weights, moments and the optimizer's own count stay as they were, on all ranks.
        A norm that is on the device stays there, a tensor of one element: reading it would wait for the step.
        """

    def state(self) -> dict[str, Any]:
        """This rank's part of what is trained and of the optimiser, nested; tensors are those of the training, which
        `step` and `load` alone change, and copies of those that passes may change too. Frozen weights come from `load`
        of the options. A checkpoint holds it at `STATE`."""

    def load(self, saved: SavedState) -> None:
        """Reads what `state` was. Raises ValueError for what another engine or model wrote."""
