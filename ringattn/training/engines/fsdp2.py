"""PyTorch's FSDP2: parameters, gradients and optimiser state sharded over all ranks of data × sequence."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.training.engines.interface import EngineOptions
from ringattn.training.models import checkpoint_layers, decoder_layers, empty_model, parameter_groups


class FSDP2Engine:
    """`fully_shard` on every decoder layer and on the root, AdamW on the shards.

    Every rank builds the model without weights; rank 0 alone makes them and they are broadcast as they are sharded, so
    host memory holds one copy of the model per machine at most. Gradients are reduced in every micro-step: this keeps
    only shards of them between micro-steps.
    """

    def __init__(self, mesh: SequenceMesh, options: EngineOptions) -> None:
        self.model = empty_model(options.config)
        self.num_parameters = sum(p.numel() for p in self.model.parameters())
        self._clip = options.clip
        options.attach(self.model)
        self._shard(_all_ranks(mesh), options)
        self.model.to_empty(device=options.device)
        _broadcast_weights(self.model, options)
        self.model.train()
        self._optimizer = torch.optim.AdamW(
            parameter_groups(self.model, options.weight_decay), lr=0.0, betas=options.betas, eps=options.eps
        )

    def _shard(self, mesh: DeviceMesh, options: EngineOptions) -> None:
        precision = MixedPrecisionPolicy()
        if options.dtype != torch.float32:
            precision = MixedPrecisionPolicy(param_dtype=options.dtype, reduce_dtype=torch.float32)
        if options.checkpoint_layers:
            checkpoint_layers(self.model)
        for layer in decoder_layers(self.model):
            fully_shard(layer, mesh=mesh, mp_policy=precision)
        fully_shard(self.model, mesh=mesh, mp_policy=precision)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of one micro-step, reduced to shards."""
        loss.backward()

    def step(self, learning_rate: float) -> torch.Tensor:
        """Clips, steps, clears the gradients; returns the global gradient norm before clipping."""
        limit = self._clip if self._clip > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def save(self, folder: Path) -> None:
        """Writes model and optimiser with torch.distributed.checkpoint; any number of ranks can read it again."""
        model, optim = get_state_dict(self.model, self._optimizer)
        dcp.save({"model": model, "optim": optim}, checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote, sharded for this run's ranks."""
        model, optim = get_state_dict(self.model, self._optimizer)
        state: dict[str, Any] = {"model": model, "optim": optim}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(self.model, self._optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])


def _all_ranks(mesh: SequenceMesh) -> DeviceMesh:
    """One mesh axis over data × sequence: every rank holds other tokens, so all of them share the parameters."""
    return mesh.device_mesh["data", "ring", "ulysses"]._flatten("all")


def _broadcast_weights(model: nn.Module, options: EngineOptions) -> None:
    """Rank 0 makes the weights; every rank gets its shards of them, and the buffers."""
    full = options.load() if dist.get_rank() == 0 else None
    weights = full.state_dict() if full is not None else {}
    set_model_state_dict(
        model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    )
    # Buffers that are not saved (rotary frequencies) are in no state dict.
    sources = dict(full.named_buffers()) if full is not None else {}
    for name, buffer in model.named_buffers():
        if full is not None:
            buffer.copy_(sources[name.replace("_checkpoint_wrapped_module.", "")])
        dist.broadcast(buffer, 0)
