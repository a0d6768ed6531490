"""Buffers in what an engine saves: a forward pass may change them while a copy of the rest is under way."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def buffers_copied(weights: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The same state of a model with copies of all its tensors but parameters, which a step alone changes."""
    held = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        name: value.clone() if isinstance(value, Tensor) and name not in held else value
        for name, value in weights.items()
    }
