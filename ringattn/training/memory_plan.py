"""What a run does about memory: what the user left open is decided from shapes, before anything is built.

Every rank decides for itself, from integers that are the same on machines of one kind; `Trainer` compares.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from ringattn.hf.head import TiledHead
from ringattn.hf.layers import tileable_mlps
from ringattn.hf.shape import model_shape
from ringattn.memory.host import host_memory
from ringattn.memory.planning.choice import Choice, choose
from ringattn.memory.planning.limits import GIB, OUTSIDE, Limits
from ringattn.memory.planning.planner import Planner
from ringattn.memory.planning.shapes import ModelShape, RunShape
from ringattn.memory.planning.text import written
from ringattn.memory.planning.ways import FreeShape
from ringattn.memory.settings import MemorySettings, StateSettings
from ringattn.memory.tiled_loss import TILE
from ringattn.parallel.machine.shipped import local_machine
from ringattn.parallel.mesh.shape import MeshShape
from ringattn.recurrent.kernels.contract import Signature
from ringattn.recurrent.kernels.registry import KERNELS
from ringattn.training.config.memory_keys import AUTO, OF_STATES, OF_STEP, state_settings, step_settings
from ringattn.training.engines.deepspeed import why_no_cpu_adam
from ringattn.training.engines.muon import matrices
from ringattn.training.resuming.save_plan import reserved_host
from ringattn.training.start.launched import Launch


@dataclass(frozen=True)
class MemoryPlan:
    """What is done about memory, and what it takes.

    Arguments:
        choice: the plan, and why it is this one; None for a model that the planner cannot read.
        note: for people.
    """

    memory: MemorySettings
    states: StateSettings
    choice: Choice | None
    note: str

    def text(self) -> str:
        """The whole plan, for people."""
        return self.note if self.choice is None else self.choice.text()

    @property
    def head_chunks(self) -> int | None:
        """In how many chunks of heads attention is computed, if that was open and has been decided."""
        return self.choice.plan.run.head_chunks if self.choice is not None and self.choice.free.chunks else None

    @property
    def items(self) -> dict[str, int]:
        """Bytes on the device by item at the fullest moment; empty if they are not known."""
        return {} if self.choice is None else dict(self.choice.plan.peak().items)

    def advice(self, asked: int) -> str:
        """What to change after memory ran out: of the settings not taken, the fastest that takes less.

        Arguments:
            asked: bytes that were wanted in vain.
        """
        if self.choice is None:
            return "memory.loss_tile, memory.mlp_tile, then memory.keep=attention, then memory.keep=layer"
        peak = self.choice.plan.peak().total
        found = self.choice.smaller(peak - asked)
        if found is None:
            return "shorter packs (data.seq_len), or more GPUs: memory's settings are at their least"
        key, value, other = found
        saved = (peak - other.alive.peak().total) / GIB
        group = "parallel" if key == "head_chunks" else "memory"
        change = f"{group}.{key}={written(value)} (saves {saved:.2f} GiB by plan)"
        return f"{change}, or memory.margin higher with memory=auto"


def plan_memory(
    cfg: DictConfig, config: Any, empty: nn.Module, shape: MeshShape, launch: Launch, device: torch.device
) -> MemoryPlan:
    """The settings of a resolved configuration.

    Arguments:
        config, empty: of the model, and it without weights.

    Raises ValueError, naming keys, for what the model cannot have, or if what is left open cannot be settled so that it
    fits.
    """
    given = {name: cfg.memory[name] for name in (*OF_STEP, *OF_STATES)}
    free = [name for name, value in given.items() if value == AUTO]
    fixed = {name: value for name, value in given.items() if value != AUTO}
    fixed |= _only_values(cfg, config, empty, free)
    if cfg.data.get("share_prefixes"):
        fixed["loss_tile"] = _tile_of_shared(fixed.get("loss_tile", TILE), empty)
    try:
        model = model_shape(empty, config, str(cfg.model.name))
    except NotImplementedError as error:
        plan = _unplanned(cfg, free, str(error))
        return replace(plan, memory=replace(plan.memory, loss_tile=fixed.get("loss_tile", plan.memory.loss_tile)))
    run, machine = run_shape(cfg, shape, device, empty), local_machine(device.type)
    run = replace(run, recurrent=_kernels_of_states(model, run, device))
    limits = limits_of(cfg, launch, device, reserved_host(cfg, empty, launch))
    if free:
        open_shape = FreeShape(chunks=cfg.parallel.head_chunks is None)
        choice = _choice(Planner(model, run, limits, machine), fixed, open_shape)
        chosen = [f"{name}={written(choice.settled.values[name])}" for name in free]
        if open_shape.chunks and (chunks := choice.plan.run.head_chunks) > 1:
            chosen.append(f"parallel.head_chunks={chunks}")
        said = f"memory=auto chose {', '.join(chosen)}; "
    else:
        choice, said = Choice(Planner(model, run, limits, machine).settled(fixed), fixed, limits, machine, ()), ""
    return MemoryPlan(choice.memory, choice.states, choice, said + _told(choice))


def _told(choice: Choice) -> str:
    """What a plan takes, in a line."""
    if lacking := choice.settled.lacking:
        return f"warning: memory will run out, by plan it needs {lacking}; memory=auto finds what fits"
    peak, away = choice.plan.peak(), sum(choice.plan.host.values())
    room = choice.limits.device_room
    note = f"planned: {peak.total / GIB:.2f} GiB of {room / GIB:.1f} a rank (at {peak.name})"
    return note + (f", {away / GIB:.2f} GiB of the host" if away else "")


def limits_of(cfg: DictConfig, launch: Launch, device: torch.device, reserved: int = 0) -> Limits:
    """What `memory.gpu_memory`, `memory.host_memory` and `memory.margin` say, or the machine does.

    Arguments:
        reserved: bytes of a machine's memory that are for other things.
    """
    host, ranks = host_memory().total, launch.ranks_per_node
    if cfg.memory.host_memory is not None:
        host = round(cfg.memory.host_memory * GIB)
    if cfg.memory.gpu_memory is not None:
        gpu = cfg.memory.gpu_memory * GIB
    elif device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device).total_memory
    else:  # then ranks compute in the host's memory
        gpu = (host or 2**50) / ranks
    outside = OUTSIDE if device.type == "cuda" else 0
    if host is not None:
        host = max(1, host - reserved)
    return Limits(gpu, host, ranks, cfg.memory.margin, outside)


def run_shape(cfg: DictConfig, shape: MeshShape, device: torch.device, empty: nn.Module) -> RunShape:
    """A run's numbers: its longest pack is one document, the dearest that there is."""
    of_muon = matrices(empty) if cfg.optim.name == "muon" else []
    rows, columns = max((tuple(p.shape) for p in of_muon), key=math.prod, default=(0, 0))
    return RunShape(
        tokens=cfg.data.seq_len,
        ring=shape.ring,
        ulysses=shape.ulysses,
        data=shape.data,
        compute=cfg.run.dtype,
        engine=cfg.engine.name,
        zero_stage=cfg.engine.get("zero_stage", 3),
        micro_steps=max(1, cfg.data.packs_per_step // shape.data),
        policy=cfg.parallel.policy,
        head_chunks=cfg.parallel.head_chunks or 1,
        kernel_sums=device.type == "cuda",
        fused=cfg.engine.compile == "elementwise",
        matrices=sum(p.numel() for p in of_muon),
        largest_matrix=(rows, columns),
    )


def _kernels_of_states(model: ModelShape, run: RunShape, device: torch.device) -> str:
    """Whose kernels compute recurrences, as far as can be said before they are tested on the device."""
    part = model.recurrent
    rule = None if part is None else part.rule
    if part is None or rule is None:
        return "torch" if device.type == "cpu" else "fused"
    if part.package is None:
        return "torch"
    dtype = torch.bfloat16 if run.compute == "bfloat16" else torch.float32
    steps = torch.float32 if part.package == "mamba" else None
    dtypes = (dtype, dtype, torch.float32, dtype if rule.delta else None, steps)
    asked = Signature(device.type, dtypes, rule.key_heads, rule.heads, rule.key_dim, rule.value_dim, rule.diagonal)
    kernel = KERNELS[part.package]
    return "torch" if kernel.refusal(asked) or kernel.missing(asked) else "fused"


def _choice(planner: Planner, fixed: dict[str, Any], free: FreeShape) -> Choice:
    """What fits. DeepSpeed's AdamW for the host, which is compiled to see whether it can be, is a last resort."""
    if planner.run.engine != "deepspeed" or "states_on" in fixed:
        return choose(planner, fixed, free)
    try:
        return choose(planner, fixed | {"states_on": "device"}, free)
    except ValueError:
        if why_no_cpu_adam("cuda" if planner.run.kernel_sums else "cpu") is not None:
            raise
    return choose(planner, fixed, free)


def _only_values(cfg: DictConfig, config: Any, empty: nn.Module, free: Collection[str]) -> dict[str, Any]:
    """Fields that are open, but have only one value for this model and engine.

    Raises ValueError for a value that the user chose and the model cannot have.
    """
    layers, out = config.get_text_config().num_hidden_layers, dict[str, Any]()
    for name in ("host_layers", "every"):
        if name not in free and cfg.memory[name] > layers:
            raise ValueError(f"memory.{name} must be at most the {layers} layers of the model, got {cfg.memory[name]}")
    tries: dict[str, Callable[[], object]] = {
        "loss_tile": lambda: TiledHead(empty).undo(),
        "mlp_tile": lambda: tileable_mlps(empty),
    }
    for name, possible in tries.items():
        tile = cfg.memory[name]
        if tile is None:
            continue
        try:
            possible()
        except NotImplementedError as error:
            if name not in free:
                raise ValueError(f"memory.{name}={tile}: {error}; use memory.{name}=null") from None
            out[name] = None
    if cfg.engine.name == "deepspeed":
        plain = StateSettings()
        out |= {name: getattr(plain, name) for name in ("reshard", "prefetch") if name in free}
    return out


def _unplanned(cfg: DictConfig, free: Collection[str], reason: str) -> MemoryPlan:
    """The records' own values where keys are open.

    Raises ValueError for layers on the host, whose bytes nobody knows.
    """
    if cfg.memory.host_layers not in (0, AUTO):
        raise ValueError(f"memory.host_layers={cfg.memory.host_layers} cannot be planned: {reason}")
    said = f"; {', '.join(f'memory.{name}' for name in free)} are as with memory=off" if free else ""
    note = f"warning: memory cannot be planned for this model ({reason}){said}"
    return MemoryPlan(step_settings(cfg), state_settings(cfg), None, note)


def _tile_of_shared(tile: int | None, empty: nn.Module) -> int:
    """The tile of a loss whose rows have several targets. Raises ValueError if there is none."""
    if tile is not None:
        return tile
    try:
        TiledHead(empty).undo()
        reason = "memory.loss_tile is null"
    except NotImplementedError as error:
        reason = str(error)
    raise ValueError(
        "data.share_prefixes=true gives tokens several targets, which only a loss in tiles takes, and "
        f"{reason}; use memory.loss_tile=auto, or data.share_prefixes=false"
    )


def values_of(plan: MemoryPlan) -> dict[str, Any]:
    """The keys of the configuration's group that the plan settles."""
    names = {one.name for kind in (MemorySettings, StateSettings) for one in fields(kind)} - {"host_bytes"}
    both = (plan.memory, plan.states)
    return {name: getattr(part, name) for part in both for name in names if hasattr(part, name)}
