"""DeepSpeed's pieces of ALST (arXiv 2506.13996), put together as its tutorial does.

Ulysses attention, the MLP and the loss in tiles, layer inputs in host memory, ZeRO-3. With one rank there is nothing to
exchange. `alst-unsharded` is the same pieces without DeepSpeed's engine, which one rank does not need either.

t tokens of this rank: an even, contiguous part of the stream.
"""

import gc
import logging
import math
import os
from contextlib import AbstractContextManager
from functools import _lru_cache_wrapper
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.training.case import Case, Place, check_host_room, new_model
from benchmarks.training.peer_attention import EXCHANGED, NAME
from benchmarks.training.rows import Tools, apply_update, enable_checkpoints, whole_batch
from benchmarks.training.states import RATE, make_moments, new_optimizer
from ringattn.hf.layers import decoder_layers


class Alst:
    """The pieces, trained by DeepSpeed's engine at stage 3 of ZeRO."""

    streams, pinned, waited = 1, 0, 0.0

    def __init__(self, case: Case, place: Place, tools: Tools) -> None:
        self._case, self._place = case, place
        self._deepspeed = import_deepspeed(place.device)
        self.model, self.features = alst_model(case, place, tools)
        self._train(tools)

    def _train(self, tools: Tools) -> None:
        self._engine, *_ = self._deepspeed.initialize(
            model=self.model,
            optimizer=self._new_optimizer(),
            config=zero_config(self._case, self._place.device),
            mpu=tools.parallel_state,
            dist_init_required=False,
        )
        self.features += ", ZeRO-3"

    def _new_optimizer(self) -> Any:
        if self._case.states.states_on == "host":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            wide = self._case.states.moments == "float32"
            return DeepSpeedCPUAdam(self.model.parameters(), lr=RATE, fp32_optimizer_states=wide)
        if not self._case.updates:
            raise NotImplementedError("ZeRO-3 has an optimizer: moments=none needs the row alst-unsharded")
        return new_optimizer(self.model, self._case)

    def prepare(self) -> None:
        ranks, rank = self._place.ranks, self._place.rank
        whole = whole_batch(self._case, self._place.device)
        size = self._case.docs.total // ranks
        rows = slice(rank * size, (rank + 1) * size)
        names = "input_ids", "position_ids", "shift_labels"
        self._batch = {name: whole[name][:, rows].contiguous() for name in names}

    def forward(self) -> Tensor:
        return self._trained(**self._batch)

    @property
    def _trained(self) -> nn.Module:
        return self._engine

    def mean_of(self, loss: Tensor) -> float:
        return self._place.total(loss) / self._place.ranks

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def update(self) -> None:
        self._engine.step()

    def close(self) -> None:
        self._engine.destroy()
        del self._engine
        forget_models()


class UnshardedAlst(Alst):
    """The pieces on one rank, trained by torch's optimizer on the weights themselves."""

    def _train(self, tools: Tools) -> None:
        case = self._case
        if self._place.ranks > 1 or case.mixed or case.states.states_on == "host":
            raise NotImplementedError("alst-unsharded is for one rank, with weights as they are computed with, there")
        self._optimizer = new_optimizer(self.model, case)
        make_moments(self._optimizer)

    @property
    def _trained(self) -> nn.Module:
        return self.model

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        apply_update(self.model, self._optimizer)

    def close(self) -> None: ...


def import_deepspeed(device: torch.device) -> Any:
    """Raises NotImplementedError if it is not installed."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise NotImplementedError(f"needs deepspeed, which cannot be imported: {error}") from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled at the first start on a CPU
    deepspeed.comm.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", dist_init_required=False)
    return deepspeed


def forget_models() -> None:
    """ZeRO-3 keeps every model that it ran, with its weights, in a list and in caches of its own."""
    from deepspeed.runtime.zero import parameter_offload

    getattr(parameter_offload, "FWD_MODULE_STACK", []).clear()
    for one in gc.get_objects():
        if isinstance(one, _lru_cache_wrapper) and (one.__module__ or "").startswith("deepspeed.runtime.zero"):
            one.cache_clear()


def alst_model(case: Case, place: Place, tools: Tools) -> tuple[nn.Module, str]:
    """A model that returns this rank's share of the loss times the number of ranks, and what it was made of."""
    if case.docs.total % place.ranks:
        raise NotImplementedError(f"{case.docs.total} tokens do not divide by {place.ranks} ranks")
    local, memory = case.docs.total // place.ranks, case.memory
    if memory.host_layers:
        # torch's allocator of locked memory rounds each tensor up to a power of two.
        share = local * case.config.hidden_size * case.dtype.itemsize
        check_host_room(case, case.config.num_hidden_layers * 2 ** math.ceil(math.log2(share)))
    tools.attention.of(case.docs)
    model: Any = new_model(case, place.device, NAME if place.ranks == 1 else EXCHANGED)
    if case.mixed:
        model.to(case.dtype)
    if place.ranks > 1:
        exchange_heads(model, place, tools)
    told = "loss in one" if memory.loss_tile is None else f"loss in {memory.loss_tile}"
    if memory.mlp_tile is not None:
        for layer in decoder_layers(model):
            _tile_mlp(layer.mlp, math.ceil(local / memory.mlp_tile))
        told += f", MLP in {memory.mlp_tile}"
    if memory.keep != "all":
        enable_checkpoints(model, True, _on_host if memory.host_layers else None)
        told += ", keep layer" + (", all layers on the host" if memory.host_layers else "")
    tiles = 1 if memory.loss_tile is None else math.ceil(local / memory.loss_tile)
    # Engines average gradients over ranks.
    _return_loss(model, tiles, place.ranks / case.num_targets)
    return model, told


def exchange_heads(model: nn.Module, place: Place, tools: Tools) -> None:
    """Ulysses takes the place of the attention that is registered under the model's name; once in a process."""
    if tools.parallel_state is not None:
        return
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    tools.parallel_state = UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation=EXCHANGED,
        sequence_parallel_size=place.ranks,
        micro_batch_size=1,
        seq_length_is_variable=True,
    )


def forget_exchange(tools: Tools) -> None:
    """Ulysses is gone from transformers, and its groups from DeepSpeed."""
    if tools.parallel_state is None:
        return
    from deepspeed.utils import groups
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    groups.mpu = None  # it would be asked for these groups by every engine after
    del ALL_ATTENTION_FUNCTIONS[EXCHANGED]
    tools.parallel_state._SEQUENCE_PARALLEL_GROUP = tools.parallel_state._SEQUENCE_DATA_PARALLEL_GROUP = None
    tools.parallel_state = None


def _on_host() -> AbstractContextManager[Any]:
    return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())


def _tile_mlp(mlp: Any, tiles: int) -> None:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    def plain(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    def forward(x: Tensor) -> Tensor:
        weights = [mlp.down_proj.weight, mlp.gate_proj.weight, mlp.up_proj.weight]
        return TiledMLP.apply(plain, mlp, x, tiles, weights)

    mlp.forward = forward


def _return_loss(model: Any, tiles: int, scale: float) -> None:
    """The model returns its loss. It is scaled in each tile: gradients of the head are made there, and never again."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    def loss_of(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden).float()
        return scale * F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")

    def forward(input_ids: Tensor, position_ids: Tensor, shift_labels: Tensor) -> Tensor:
        hidden = model.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        head = model.lm_head
        return TiledFusedLogitsLoss.apply(
            loss_of, head, hidden, shift_labels, None, tiles, [head.weight], "sum"
        )  # fmt: skip

    model.forward = forward


def zero_config(case: Case, device: torch.device) -> dict[str, Any]:
    """Stage 3 with the states of the case, the rest as DeepSpeed has it by default."""
    states, narrow = case.states, case.states.weights == "bfloat16"
    place = {"device": "cpu", "pin_memory": device.type == "cuda"}
    on_host = {"offload_optimizer": place, "offload_param": place} if states.states_on == "host" else {}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, **on_host},
        "zero_allow_untested_optimizer": True,
        "bf16": {
            "enabled": case.dtype == torch.bfloat16,
            "bf16_master_weights_and_grads": narrow,
            "bf16_optimizer_states": narrow,
        },
        "communication_data_type": "fp32" if states.reduce == "float32" else "bf16",
        "data_types": {"grad_accum_dtype": "bf16" if narrow else "fp32"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
