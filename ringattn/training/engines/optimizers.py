"""AdamW with the states that are asked for: torch's own, or torchao's with moments of 16 or 8 bits."""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from ringattn.memory.settings import StateSettings
from ringattn.training.engines.interface import EngineOptions

INSTALL = "pip install 'ringattn[memory]'"
# Pairs of (weights, moments) that torch (the first) and torchao have an AdamW for.
PAIRS = (("float32", "float32"), ("float32", "int8"), ("bfloat16", "bfloat16"), ("bfloat16", "int8"))


def why_no_optimizer(states: StateSettings) -> str | None:
    """Why there is no optimizer with such weights and moments here, or None if there is one. Imports nothing."""
    pair = states.weights, states.moments
    if pair not in PAIRS:
        there = "; ".join(f"weights={weights} moments={moments}" for weights, moments in PAIRS)
        return f"there is no AdamW with weights={pair[0]} and moments={pair[1]}, only with {there}"
    if pair != PAIRS[0] and importlib.util.find_spec("torchao") is None:
        return f"weights={pair[0]} and moments={pair[1]} need torchao: {INSTALL}"
    return None


def adamw(groups: list[dict[str, Any]], options: EngineOptions) -> torch.optim.Optimizer:
    """AdamW over groups of parameters that are in the dtype of `states.weights`, on the device where they are.

    torch's fused kernel holds nothing beside the states. torchao computes in float32, rounds bfloat16 weights by chance,
    and keeps moments in bfloat16 or, in blocks of 256 numbers, in 8 bits (Dettmers et al., arXiv 2110.02861); moments of
    a shard with less than 4,096 numbers, or not a multiple of 256, are in the weights' dtype.

    Raises ValueError where `why_no_optimizer` has a reason.
    """
    states = options.states
    if (reason := why_no_optimizer(states)) is not None:
        raise ValueError(reason)
    given: dict[str, Any] = {"lr": 0.0, "betas": options.betas, "eps": options.eps}
    if (states.weights, states.moments) == PAIRS[0]:
        return torch.optim.AdamW(groups, fused=True, **given)
    from torchao.optim import AdamW8bit, _AdamW

    by_moments: dict[str, Any] = {"bfloat16": _AdamW, "int8": AdamW8bit}
    made: torch.optim.Optimizer = by_moments[states.moments](
        groups, bf16_stochastic_round=states.weights == "bfloat16", **given
    )
    return made


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The same rate in all groups. torchao's compiled step reads it from a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
