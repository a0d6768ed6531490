"""The recipe's `memory` group: its keys, what they may hold, and what an engine cannot do."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from omegaconf import DictConfig

from ringattn.memory.settings import MemorySettings, StateSettings
from ringattn.training.engines.deepspeed import why_no_cpu_adam, why_not
from ringattn.training.engines.optimizers import why_no_optimizer

AUTO = "auto"
OF_STEP = tuple(one.name for one in fields(MemorySettings) if one.name != "host_bytes")  # bytes follow from layers
OF_STATES = tuple(one.name for one in fields(StateSettings))
# They change the numbers of a run, so that nobody else may choose them.
OF_CURVE = ("weights", "moments", "reduce")
# Smallest and largest value; null: what the machine has.
SIZES = {"gpu_memory": (0.0, math.inf), "host_memory": (0.0, math.inf)}
KEYS = {f"memory.{name}" for name in (*OF_STEP, *OF_STATES, *SIZES, "margin")}
# May be null, which is the same as left out.
OPTIONAL = {f"memory.{name}" for name in ("loss_tile", "mlp_tile", *SIZES)}
SHAPE_CURVE = {f"memory.{name}" for name in OF_CURVE}
# What runs did before there were these keys.
BEFORE = {f"memory.{name}": getattr(StateSettings(), name) for name in OF_CURVE}


def step_settings(cfg: DictConfig) -> MemorySettings:
    """What is alive within a step. A key that is `auto` has the record's own value.

    Raises ValueError naming the key.
    """
    chosen = _chosen(cfg, OF_STEP)
    if "keep" not in chosen and (chosen.get("host_layers") or chosen.get("every", 1) > 1):
        chosen["keep"] = "layer"  # what these go with: keep=auto will come to one of them
    # How many bytes these layers need is known when the model and the lengths are.
    return _record(MemorySettings, chosen | {"host_bytes": int(bool(chosen.get("host_layers")))})


def state_settings(cfg: DictConfig) -> StateSettings:
    """What lives between steps. A key that is `auto` has the record's own value.

    Raises ValueError naming the key.
    """
    return _record(StateSettings, _chosen(cfg, OF_STATES))


def check_memory(cfg: DictConfig, device_type: str) -> None:
    """Raises ValueError, naming the key, for a value that cannot be or that the engine cannot do on this machine."""
    memory = cfg.memory
    for name in OF_CURVE:
        if memory[name] == AUTO:
            raise ValueError(f"memory.{name} changes the numbers of a run and must be chosen: it cannot be {AUTO}")
    for name, (low, high) in SIZES.items():
        if memory[name] is not None and not (_is_number(memory[name]) and low < memory[name] <= high):
            raise ValueError(f"memory.{name} must be a number of GiB above {low:g}, or null, got {memory[name]!r}")
    if not _is_number(memory.margin) or not 0 <= memory.margin < 1:
        raise ValueError(f"memory.margin must be a number in [0, 1), got {memory.margin!r}")
    step_settings(cfg)
    states = state_settings(cfg)
    if cfg.engine.name == "fsdp2":
        if (reason := why_no_optimizer(states)) is not None:
            raise ValueError(f"memory.weights={states.weights} memory.moments={states.moments}: {reason}")
        return
    stage = cfg.engine.zero_stage
    if (reason := why_not(states, stage)) is not None:
        raise ValueError(f"memory.{reason}")
    if states.states_on == "host" and (reason := why_no_cpu_adam(device_type)) is not None:
        raise ValueError(f"memory.states_on=host: {reason}; use memory.states_on=device or engine=fsdp2")


def _chosen(cfg: DictConfig, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := cfg.memory[name]) != AUTO}


def _record(kind: Any, values: Mapping[str, Any]) -> Any:
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"memory.{error}") from None  # every message begins with the field


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
