"""What saving takes beside the training: host memory for copies, and whether there is room for them."""

import math
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import nn

from ringattn.memory.host import host_memory
from ringattn.memory.planning.shapes import ITEMSIZE
from ringattn.memory.planning.states import MOMENT_BYTES
from ringattn.memory.settings import StateSettings
from ringattn.training.checkpoint.memory_copies import copies_folder, copies_of, is_memory, lacking_room
from ringattn.training.config.checks import compute_dtype
from ringattn.training.engines.optimizers import kept_whole
from ringattn.training.start.launched import Launch

AUTO = "auto"
WIDEST = StateSettings()


def machine_bytes(cfg: DictConfig, empty: nn.Module, states: StateSettings, launch: Launch) -> int:
    """Bytes that the ranks of a machine save together: weights that are trained, and their moments."""
    whole = {id(parameter) for parameter in kept_whole(empty)}
    wide, total, count = ITEMSIZE[states.weights], 0.0, 0
    for parameter in empty.parameters():
        if parameter.requires_grad:
            moment = wide if id(parameter) in whole else MOMENT_BYTES[states.moments]
            total += parameter.numel() * (wide + 2 * moment)
            count += parameter.numel()
    share = total / launch.world_size * launch.ranks_per_node
    if cfg.engine.name == "deepspeed":  # rank 0 saves what is computed with, too, or each rank its part
        computed = count * compute_dtype(cfg).itemsize
        share += computed if cfg.engine.zero_stage < 3 else computed / launch.world_size * launch.ranks_per_node
    return math.ceil(share)


def reserved_host(cfg: DictConfig, empty: nn.Module, launch: Launch) -> int:
    """Bytes of a machine's memory that saving takes where it was asked for: the plan of memory has so much less.

    What `run.async_save=auto` may take is not among them: it takes what the plan leaves.
    """
    size = machine_bytes(cfg, empty, WIDEST, launch)
    in_memory = cfg.run.memory_every and is_memory(Path(cfg.run.memory_folder))
    copies = copies_of(cfg.run.memory_neighbours) if in_memory else 0
    return size * (copies + (cfg.run.async_save is True))


def settle_saving(
    cfg: DictConfig, empty: nn.Module, states: StateSettings, launch: Launch, device: torch.device, output: Path
) -> bool:
    """Whether saves of this run are asynchronous. `auto`: where GPUs compute, which need the host for little, and its
    memory holds a copy twice over; on the CPU the thread would take a core from the step.

    Raises ValueError if `run.memory_folder` has no room, or what is saved cannot be read from one machine alone.
    """
    size = machine_bytes(cfg, empty, states, launch)
    if cfg.run.memory_neighbours and not cfg.run.memory_every:
        raise ValueError("run.memory_neighbours=true keeps copies in memory: set run.memory_every to the steps between")
    if cfg.run.memory_every:
        several = launch.world_size > launch.ranks_per_node
        if several and cfg.engine.name == "deepspeed" and cfg.engine.zero_stage < 3:
            raise ValueError(
                f"run.memory_every={cfg.run.memory_every}: with engine=deepspeed engine.zero_stage="
                f"{cfg.engine.zero_stage} rank 0 alone saves the model's weights, and other machines have no copy; "
                "use engine.zero_stage=3, engine=fsdp2 or run.memory_every=0"
            )
        folder = Path(cfg.run.memory_folder)
        if cfg.run.memory_neighbours and not several and not cfg.run.elastic:
            raise ValueError(
                "run.memory_neighbours=true: there is one machine, and nobody to keep copies; use false, or "
                "run.elastic=true for a run that may go on with one"
            )
        neighbours = cfg.run.memory_neighbours and several
        if lacking := lacking_room(folder, copies_folder(folder, output), size, neighbours):
            raise ValueError(f"run.memory_every={cfg.run.memory_every}: {lacking}; use another run.memory_folder or 0")
    if cfg.run.async_save != AUTO:
        return bool(cfg.run.async_save)
    available = host_memory().available
    return device.type == "cuda" and (available is None or available >= 2 * size)
