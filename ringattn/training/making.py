"""What a run makes before its first step: the mesh, the engine with the model in it, and what libraries are told."""

import random
import warnings

import numpy as np
import torch
from torch import nn

from ringattn import init_mesh
from ringattn.hf import parallelize
from ringattn.hf.elementwise import Elementwise
from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.training.config.checks import compute_dtype
from ringattn.training.engines import Engine, EngineOptions, build_engine
from ringattn.training.health.rank import Health
from ringattn.training.model.lora import lora_of
from ringattn.training.model.models import build_model, empty_model
from ringattn.training.model.streamed import streamed_weights
from ringattn.training.start.job import Job


def mesh_of(job: Job) -> SequenceMesh:
    """The mesh that `parallel` names. Collective."""
    parallel = job.cfg.parallel
    return init_mesh(
        data=parallel.data,
        ring=parallel.ring,
        ulysses=parallel.ulysses,
        device_type=job.device.type,
        ulysses_across_nodes=parallel.ulysses_across_nodes,
    )


def engine_of(job: Job, mesh: SequenceMesh, health: Health) -> Engine:
    """The engine that `engine` names, with the model and the optimizer in it. Collective.

    Arguments:
        health: follows the model's layers.
    """
    cfg = job.cfg
    config, lora, frozen = job.model_config, lora_of(cfg.model), list(cfg.model.freeze)

    def attach(model: nn.Module) -> None:
        health.watch_layers(model)
        _attach(model, job, mesh)

    options = EngineOptions(
        empty=lambda: empty_model(config, lora, frozen),
        load=lambda: build_model(config, cfg.run.seed, cfg.model.path, list(cfg.model.allow_mismatch), lora, frozen),
        attach=attach,
        device=job.device,
        dtype=compute_dtype(cfg),
        weight_decay=cfg.optim.weight_decay,
        betas=(cfg.optim.betas[0], cfg.optim.betas[1]),
        eps=cfg.optim.eps,
        clip=cfg.optim.clip,
        micro_steps=cfg.data.packs_per_step // mesh.data,
        zero_stage=cfg.engine.get("zero_stage", 0),
        stream=lambda: streamed_weights(config, cfg.run.seed, cfg.model.path, lora),
        momentum=cfg.optim.momentum if cfg.optim.name == "muon" else None,
        states=job.plan.states,
    )
    return build_engine(cfg.engine.name, mesh, options)


def _attach(model: nn.Module, job: Job, mesh: SequenceMesh) -> None:
    """What is done to a model before it is sharded."""
    parallel = job.cfg.parallel
    if job.cfg.engine.compile == "elementwise":
        Elementwise(model)
    parallelize(
        model,
        mesh,
        job.plan.memory,
        scheme=parallel.scheme,
        backend=parallel.backend,
        head_chunks=parallel.head_chunks,
        deterministic=job.cfg.run.deterministic,
    )


def seed_libraries(seed: int, rank: int) -> None:
    """Random states for dropout and the like, another one for each rank; the weights have their own seed."""
    random.seed(seed * 1_000_003 + rank)
    np.random.seed((seed * 1_000_003 + rank) % 2**32)  # noqa: NPY002  libraries use the global generator
    torch.manual_seed(seed * 1_000_003 + rank)


def quiet_libraries() -> None:
    """Libraries speak of errors only: a run of many ranks would repeat their advice on every one."""
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
