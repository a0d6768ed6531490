"""Which engine a run trains with, by name."""

from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.training.engines.interface import Engine, EngineOptions


def build_engine(name: str, mesh: SequenceMesh, options: EngineOptions) -> Engine:
    """`fsdp2` or `deepspeed`. Collective. Raises ValueError for another name."""
    if name == "fsdp2":
        from ringattn.training.engines.fsdp2 import FSDP2Engine

        return FSDP2Engine(mesh, options)
    if name == "deepspeed":
        from ringattn.training.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(mesh, options)
    raise ValueError(f"engine.name must be fsdp2 or deepspeed, got {name!r}")
