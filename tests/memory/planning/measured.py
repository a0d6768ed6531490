"""A tiny model's step by what PyTorch makes and drops, and the same by the plan."""

from typing import Any

import torch
from torch import Tensor

from ringattn import Documents, init_mesh
from ringattn.hf import attention_kwargs, parallelize
from ringattn.hf.layers import decoder_layers, mlps_of
from ringattn.hf.shape import model_shape
from ringattn.memory import offload as offloading
from ringattn.memory.layers import keep_layers
from ringattn.memory.offload import Offload
from ringattn.memory.planning import layers as layers_of
from ringattn.memory.planning.alive import Alive
from ringattn.memory.planning.attention import AttentionUse
from ringattn.memory.planning.items import GATHERED, MOMENTS, REDUCING, WEIGHTS, WORKSPACE, Moment
from ringattn.memory.planning.recurrent import RecurrentUse
from ringattn.memory.planning.shapes import RunShape
from ringattn.memory.settings import MemorySettings, StateSettings
from ringattn.memory.tiled_loss import tiled_loss
from ringattn.memory.tiled_rows import TiledModule
from ringattn.parallel.layout import Layout
from ringattn.parallel.machine.shipped import SHIPPED
from tests.memory.planning.tracker import Tracker
from tests.training.token_loss import token_loss_sum

LEAST = 2**14
# Of an engine and of a GPU, which the tracker has not.
ELSEWHERE = (WEIGHTS, MOMENTS, GATHERED, WORKSPACE, REDUCING)
SETTINGS: dict[str, MemorySettings] = {
    "plain": MemorySettings(),
    "loss": MemorySettings(loss_tile=64),
    "loss, MLP": MemorySettings(loss_tile=64, mlp_tile=64),
    "layer": MemorySettings(loss_tile=64, keep="layer"),
    "layer, MLP": MemorySettings(loss_tile=64, mlp_tile=64, keep="layer"),
    "selective": MemorySettings(loss_tile=64, keep="selective"),
    "attention": MemorySettings(loss_tile=64, keep="attention"),
    "attention, MLP": MemorySettings(loss_tile=64, mlp_tile=64, keep="attention"),
    "layer of every 2": MemorySettings(loss_tile=64, mlp_tile=64, keep="layer", every=2),
    "attention, three away": MemorySettings(
        loss_tile=64, mlp_tile=64, keep="attention", host_layers=3, host_bytes=2**22
    ),
    "layer, all away": MemorySettings(loss_tile=64, mlp_tile=64, keep="layer", host_layers=4, host_bytes=2**22),
}


def measured(
    model: Any, memory: MemorySettings, documents: list[int], ring: int = 1
) -> tuple[dict[str, int], int, Layout]:
    """The most bytes of live tensors in each pass, beside weights and gradients that were there; host bytes used."""
    parallelize(model, mesh := init_mesh(ring=ring))
    if memory.mlp_tile:
        for mlp in mlps_of(model):
            TiledModule(mlp, memory.mlp_tile)
    offload = Offload(torch.device("cpu"), memory.host_bytes, least=LEAST) if memory.host_layers else None
    if memory.keep != "all":
        keep_layers(decoder_layers(model), memory.keep, offload, memory.host_layers, every=memory.every)
    given = attention_kwargs(layout := Layout(Documents(documents), mesh, "contiguous"))
    ids = torch.arange(layout.tokens())[None] % 256
    positions = layout.position_ids(torch.device("cpu"))[None]

    def loss() -> Tensor:
        asked = {"input_ids": ids, "position_ids": positions, "use_cache": False, **given}
        if memory.loss_tile:
            hidden = model.model(**asked).last_hidden_state
            return tiled_loss(hidden[0], model.lm_head.weight, ids[0], tile=memory.loss_tile)
        out = model(**asked)  # with what the model does to its logits
        loss = token_loss_sum(out.logits[0], ids[0])
        return loss if (routers := getattr(out, "aux_loss", None)) is None else loss + routers

    loss().backward()  # whatever is made once
    model.zero_grad()
    with Tracker() as tracker, tracker.kernels_as_operators():
        made = loss()
        peaks = {"forward": tracker.peak}
        tracker.begin_peak()
        made.backward()
        peaks["backward"] = tracker.peak
    return peaks, 0 if offload is None else offload.stack.most, layout


def stated(alive: Alive) -> dict[str, int]:
    """The same by the plan."""

    def comparable(moment: Moment) -> int:
        of_mlp = moment.name.startswith("MLP") and moment.phase == "backward"
        mlp = alive.layers[int(moment.name.split()[-1])].mlp if of_mlp else None
        tiles = 0 if mlp is None else mlp.tile_grads
        # That of a head which is the embedding is a gradient here as soon as it is there.
        waits = moment.phase == "backward" and "logits" not in moment.name and moment.name != "embedding"
        tiles += alive.head_gradient if alive.model.tied and waits else 0
        indices = 24 * alive.run.local_tokens  # ids, positions and targets were there before
        return moment.total - sum(moment.items.get(name, 0) for name in ELSEWHERE) + tiles - indices

    return {
        phase: max(comparable(moment) for moment in alive.moments if moment.phase == phase)
        for phase in ("forward", "backward")
    }


def compared(
    make: Any, given: tuple[Any, ...], dtype: str, names: list[str], documents: list[int], ring: int = 1
) -> list[tuple[str, str, float]]:
    """Of each setting and pass, stated by measured, on the rank that calls.

    Arguments:
        make: from `given` to a model in float32 and its configuration.
    """
    out = []
    layers_of.IN_FLIGHT = 0  # on a CPU nothing is under way
    layers_of.LEAST = LEAST
    for name in names:
        memory = SETTINGS[name]
        model, config = make(*given)
        shape = model_shape(model, config)
        peaks, host, layout = measured(model.to(getattr(torch, dtype)), memory, documents, ring)
        run = RunShape(
            sum(documents), ring=ring, lengths=tuple(documents), compute=dtype, policy="contiguous", kernel_sums=False,
            recurrent="torch",
        )  # fmt: skip
        machine = SHIPPED["H200"]
        use, recurrent = AttentionUse.of(shape, run, machine), RecurrentUse.of(shape, run, machine)
        alive = Alive(shape, run, memory, StateSettings(weights=dtype), use, recurrent=recurrent)  # type: ignore[arg-type]
        assert layout.tokens() == run.local_tokens
        out += [(name, phase, size / peaks[phase]) for phase, size in stated(alive).items()]
        out.append((name, "host", alive.layers.host_bytes / host if host else 1.0))
    layers_of.IN_FLIGHT, layers_of.LEAST = offloading.IN_FLIGHT, offloading.LEAST
    return out
