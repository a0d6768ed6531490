"""PyTorch's FSDP2: parameters, gradients and optimiser state sharded over all ranks of data × sequence."""

from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy

from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.training.checkpoint.saved_state import SavedState
from ringattn.training.engines.alike import bits_of, numbers_of
from ringattn.training.engines.buffers import buffers_copied
from ringattn.training.engines.clipping import clip_sharded
from ringattn.training.engines.first_weights import first_weights, hold_weights_in
from ringattn.training.engines.groups import shard_groups
from ringattn.training.engines.interface import STATE, EngineOptions
from ringattn.training.engines.muon import muon
from ringattn.training.engines.optimizers import adamw, set_learning_rate, step_if_finite

# What a checkpoint holds. Reading is strict all the same: `SavedState` raises for what is not there.
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


class FSDP2Engine:
    """`fully_shard` on the groups of `groups.py`, AdamW (or Muon) on the shards.

    Every rank builds the model without weights, and reads from the files at `model.path` what its shards need. Weights
    that are drawn, or converted as they are loaded, rank 0 alone makes, and they are broadcast as they are sharded.
    Gradients are reduced in every micro-step: this keeps only shards of them between micro-steps.
    """

    goes_back_twice = True

    def __init__(self, mesh: SequenceMesh, options: EngineOptions) -> None:
        states = options.states
        self.model = options.empty()
        self.num_parameters = sum(p.numel() for p in self.model.parameters())
        self._clip, self._device, self._mesh = options.clip, options.device, _all_ranks(mesh)
        options.attach(self.model)
        hold_weights_in(self.model, states)
        shard_groups(self.model, states, mesh=self._mesh, mp_policy=_precision(options), offload_policy=_place(options))
        self.model.to_empty(device=options.device if states.states_on == "device" else "cpu")
        first_weights(self.model, options)
        self.model.train()
        self._optimizer = adamw(self.model, options) if options.momentum is None else muon(self.model, options)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of one micro-step, reduced to shards."""
        loss.backward()

    def step(self, learning_rate: float) -> torch.Tensor:
        """Clips, steps where the norm is finite, clears the gradients; returns the global norm before clipping."""
        norm = clip_sharded(self.model.parameters(), self._clip, self._device, self._mesh.get_group())
        set_learning_rate(self._optimizer, learning_rate)
        step_if_finite(self._optimizer, norm)
        self.forget()
        return norm

    def norm(self) -> torch.Tensor:
        """The global norm of the gradients that are there."""
        return clip_sharded(self.model.parameters(), 0.0, self._device, self._mesh.get_group())

    def forget(self) -> None:
        """Drops the gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def alike(self) -> dict[str, Any]:
        """Parameters are shards, another one on every rank; buffers and the optimizer's numbers are not."""
        return {"buffers": bits_of(self.model.buffers())} | numbers_of(self._optimizer)

    def state(self) -> dict[str, Any]:
        """Shards of what is trained, and the optimizer's of each. Settings of its groups are the configuration's."""
        model, optim = get_state_dict(self.model, self._optimizer, options=_TRAINED)
        return {"model": buffers_copied(model, self.model), "optim": optim["state"]}

    def load(self, saved: SavedState) -> None:
        """Reads what `state` was on any number of ranks, sharded for this run's."""
        model, optim = get_state_dict(self.model, self._optimizer, options=_TRAINED)
        saved.fill(STATE, {"model": model, "optim": optim["state"]})
        set_state_dict(self.model, self._optimizer, model_state_dict=model, optim_state_dict=optim, options=_TRAINED)


def _all_ranks(mesh: SequenceMesh) -> DeviceMesh:
    """One mesh axis over data × sequence: every rank holds other tokens, so all of them share the parameters."""
    return mesh.device_mesh["data", "ring", "ulysses"]._flatten("all")


def _precision(options: EngineOptions) -> MixedPrecisionPolicy:
    """Computation in `dtype`, sums over ranks in `states.reduce`."""
    return MixedPrecisionPolicy(param_dtype=options.dtype, reduce_dtype=getattr(torch, options.states.reduce))


def _place(options: EngineOptions) -> OffloadPolicy:
    if options.states.states_on == "device":
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=options.device.type == "cuda")
