"""The weights that a sharded model begins with: read by each rank from files, or made whole by one rank."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor

from ringattn.memory.settings import StateSettings
from ringattn.training.checkpoint.snapshot import first_row
from ringattn.training.engines.interface import EngineOptions
from ringattn.training.model.streamed import StreamedWeights


def first_weights(model: nn.Module, options: EngineOptions) -> None:
    """Fills a model that is sharded by rows, whose tensors have memory and no values yet. Collective."""
    weights = None if options.stream is None else options.stream()
    # Machines may see different files, and all ranks must take the same way.
    there = torch.tensor(float(weights is not None), device=options.device)
    dist.all_reduce(there, dist.ReduceOp.MIN)
    if weights is not None and there.item():
        _read(model, weights, options.device)
    else:
        _broadcast(model, options)


def hold_weights_in(model: nn.Module, states: StateSettings) -> None:
    """Casts parameters one by one, and no buffers: rotary frequencies of 8 bits would turn long positions."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, states.weights))


@torch.no_grad()
def _read(model: nn.Module, weights: StreamedWeights, device: torch.device) -> None:
    """Every rank its own rows, a tensor at a time: no more than one tensor's is in memory beside the shards."""
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        local, start = parameter.to_local(), first_row(parameter)
        if len(local):
            local.copy_(weights.rows(name, start, start + len(local)))
    _set_buffers(
        model, device, lambda name, _: (weights.rows(name) if name in weights else weights.buffers[name]).to(device)
    )


def _broadcast(model: nn.Module, options: EngineOptions) -> None:
    """Rank 0 makes the weights; every rank gets its shards of them, and the buffers."""
    full = options.load() if dist.get_rank() == 0 else None
    if full is not None:
        hold_weights_in(full, options.states)
    weights = full.state_dict() if full is not None else {}
    set_model_state_dict(
        model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    )
    sources = dict(full.named_buffers()) if full is not None else {}

    def sent(name: str, buffer: Tensor) -> Tensor:
        moved = sources[name].to(options.device) if full is not None else buffer.to(options.device)
        dist.broadcast(moved, 0)
        return moved

    _set_buffers(model, options.device, sent)


def _set_buffers(model: nn.Module, device: torch.device, value: Callable[[str, Tensor], Tensor]) -> None:
    """Buffers compute, so that they are on the device wherever weights wait. Those that are not saved (rotary
    frequencies) are in no state dict."""
    for name, buffer in [*model.named_buffers()]:
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, value(name, buffer).to(device, buffer.dtype))
