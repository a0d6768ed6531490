"""What the planner says of a case, to stand beside what is measured."""

from dataclasses import fields
from typing import Any

from benchmarks.training.case import Case, Place
from ringattn.hf.shape import model_shape
from ringattn.memory.planning.limits import Limits
from ringattn.memory.planning.planner import Planner
from ringattn.memory.planning.settled import Settled
from ringattn.memory.planning.shapes import ModelShape, RunShape
from ringattn.memory.settings import MemorySettings, StateSettings
from ringattn.parallel.machine.shipped import local_machine
from ringattn.training.model.models import empty_model


def plan(config: Any, run: RunShape, memory: dict[str, Any], states: StateSettings, device_type: str) -> Settled:
    """The plan of a model, with these fields of `MemorySettings`; without `host_bytes` these are what is needed."""
    own = {one.name: getattr(states, one.name) for one in fields(StateSettings)}
    planner = Planner(_shape(config.to_json_string(), config), run, Limits(2**60), local_machine(device_type))
    return planner.settled({**memory, **own})


def plan_of(case: Case, place: Place) -> Settled:
    """The plan of a case, as trained under FSDP2."""
    memory = {one.name: getattr(case.memory, one.name) for one in fields(MemorySettings)}
    return plan(case.config, run_of(case, place), memory, case.states, place.device.type)


def run_of(case: Case, place: Place) -> RunShape:
    mesh = place.mesh
    return RunShape(
        case.docs.total,
        ring=mesh.ring,
        ulysses=mesh.ulysses,
        head_chunks=case.head_chunks,
        lengths=tuple(case.docs.lengths),
        compute=str(case.dtype).removeprefix("torch."),
        kernel_sums=place.device.type == "cuda",
        fused=case.fused != "none",
    )


_shapes: dict[str, ModelShape] = {}


def _shape(key: str, config: Any) -> ModelShape:
    if key not in _shapes:
        _shapes[key] = model_shape(empty_model(config), config)
    return _shapes[key]
