"""Weights and optimizer: the same states for all rows, sharded by FSDP2. One rank of a peer has nothing to shard."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from benchmarks.training.case import Case, Place
from ringattn.hf.layers import decoder_layers
from ringattn.training.engines.optimizers import adamw_int8, kept_whole, why_no_optimizer

RATE = 1e-6  # the learning rate: figures of the second step are those of the same model


def shard_model(model: nn.Module, case: Case, place: Place) -> None:
    """FSDP2 on every layer and on the root of a peer's model. One rank whose weights are as it uses them needs none."""
    if place.ranks == 1 and not case.mixed and case.states.states_on == "device":
        return
    options = sharded(case, place)
    for layer in decoder_layers(model):
        fully_shard(layer, reshard_after_forward=case.states.reshard, **options)
    fully_shard(model, **options)


def sharded(case: Case, place: Place) -> dict[str, Any]:
    """How FSDP2 shards each group of a model."""
    reduced = torch.float32 if case.states.reduce == "float32" else torch.bfloat16
    on_host = case.states.states_on == "host"
    return {
        "mesh": init_device_mesh(place.device.type, (place.ranks,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=case.dtype, reduce_dtype=reduced),
        "offload_policy": CPUOffloadPolicy(pin_memory=place.device.type == "cuda") if on_host else OffloadPolicy(),
    }


def new_optimizer(model: nn.Module, case: Case) -> torch.optim.Optimizer | None:
    """AdamW whose moments have the dtype that the case says; None for a case without updates.

    torch's keeps moments in the dtype of the weights. Raises NotImplementedError for what no installed one does.
    """
    if not case.updates:
        return None
    states = case.states
    if states.moments == "int8":
        if (reason := why_no_optimizer(states)) is not None:
            raise NotImplementedError(reason)
        groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
        given = {"lr": RATE, "weight_decay": 0.0, "bf16_stochastic_round": states.weights == "bfloat16"}
        return adamw_int8(groups, kept_whole(model), given)
    if states.moments != states.weights:
        raise NotImplementedError(
            f"moments={states.moments} of weights={states.weights}: torch's AdamW has moments in the dtype of weights"
        )
    return torch.optim.AdamW(list(model.parameters()), lr=RATE, weight_decay=0.0, fused=True)


def make_moments(optimizer: torch.optim.Optimizer | None) -> None:
    """A step with gradients of zero, which changes nothing: moments are there before the first step."""
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def clear_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None
