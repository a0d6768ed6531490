"""AdamW with the states that are asked for: torch's own, or torchao's with moments of 16 or 8 bits."""

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor, nn

from ringattn.memory.settings import StateSettings
from ringattn.training.engines.interface import EngineOptions
from ringattn.training.model.models import parameter_groups

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


def adamw(model: nn.Module, options: EngineOptions) -> torch.optim.Optimizer:
    """AdamW over the parameters of a model, which are in the dtype of `states.weights`, where they are.

    torch's fused kernel holds nothing beside the states. torchao computes in float32, rounds bfloat16 weights by
    chance, and keeps moments in bfloat16 or, in blocks of 256 numbers, in 8 bits (Dettmers et al., arXiv 2110.02861).
    Moments of `kept_whole` stay in the weights' dtype, and those of a shard with less than 4,096 numbers or not a
    multiple of 256.

    Raises ValueError where `why_no_optimizer` has a reason.
    """
    states = options.states
    if (reason := why_no_optimizer(states)) is not None:
        raise ValueError(reason)
    groups = parameter_groups(model, options.weight_decay)
    given: dict[str, Any] = {"lr": 0.0, "betas": options.betas, "eps": options.eps}
    if (states.weights, states.moments) == PAIRS[0]:
        return torch.optim.AdamW(groups, fused=True, **given)
    given["bf16_stochastic_round"] = states.weights == "bfloat16"
    if states.moments == "int8":
        return adamw_int8(groups, kept_whole(model), given)
    from torchao.optim import _AdamW

    made: torch.optim.Optimizer = _AdamW(groups, **given)
    return made


def kept_whole(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that should not have moments of 8 bits: embeddings, and whatever has the shape of one (the head).

    The gradient of an embedding is exactly zero in most rows of a step. In 8 bits the second moment of a small number
    beside a large one is 0, and its first is not. The next gradient hides that, except where there is none: then AdamW
    divides a first moment by epsilon, and the step is a hundred times too long. (transformers keeps embeddings out of
    bitsandbytes' 8 bits, too.)

    Those of the same shape are the price of torch.compile (2.13): it does not look at what shards are made of, and
    would run the step of one kind of moments on the other.
    """
    shapes = {module.weight.shape for module in model.modules() if isinstance(module, nn.Embedding)}
    return [parameter for parameter in model.parameters() if parameter.shape in shapes]


def adamw_int8(groups: list[dict[str, Any]], whole: list[nn.Parameter], given: dict[str, Any]) -> torch.optim.Optimizer:
    """torchao's AdamW8bit, with moments in the weights' dtype for the parameters in `whole`.

    Arguments:
        groups: of parameters, as torch's optimizers take them.
        given: further arguments of AdamW8bit.
    """
    from torchao.optim import AdamW8bit
    from torchao.optim.subclass_8bit import OptimState8bit

    kept = {id(parameter) for parameter in whole}

    class AdamWInt8(AdamW8bit):
        block_size: float  # numbers that share a scale

        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            block = self.block_size
            self.block_size = math.inf if id(p) in kept else block  # torchao's word for "not at all"
            try:
                buffer: Tensor = super()._new_buffer(p, signed)
            finally:
                self.block_size = block
            return buffer

        @staticmethod
        def _subclass_zeros(p: Tensor, signed: bool, block_size: int) -> Tensor:
            # Of itself it would say to be of the weights' dtype; but views forget that, and shards are views.
            zeros: Tensor = OptimState8bit.zeros(p.shape, signed, block_size, p.device)
            return zeros

    made: torch.optim.Optimizer = AdamWInt8(groups, **given)
    return made


def step_if_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """One step where the gradient norm is finite; else weights and moments, and the optimizer's count, stay.

    torch's fused kernel decides on the device. torchao's step cannot, so that the host waits for the norm before it.

    Arguments:
        norm: of all gradients, a scalar, the same on every rank.
    """
    if not optimizer.defaults.get("fused"):
        if bool(torch.isfinite(norm)):
            optimizer.step()
        return
    place = next(p.device for group in optimizer.param_groups for p in group["params"])
    optimizer.found_inf = (~torch.isfinite(norm)).to(torch.float32).to(place)  # type: ignore[attr-defined]
    optimizer.step()


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The same rate in all groups. torchao's compiled step reads it from a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
