"""The model that is evaluated: of a training run's newest checkpoint, or of a saved Hugging Face folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from ringattn.hf import parallelize
from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.training.checkpoint import newest_checkpoint
from ringattn.training.data.tokenizer import AUTO, BYTES, has_tokenizer
from ringattn.training.engines import EngineOptions, build_engine
from ringattn.training.evaluation.settings import Settings
from ringattn.training.evaluation.weights import load_trained
from ringattn.training.model.architecture import changed_config, configured
from ringattn.training.model.lora import Lora, lora_of
from ringattn.training.model.models import build_model, empty_model
from ringattn.training.start.output import config_of, read_config


@dataclass(frozen=True)
class Source:
    """A model that can be made.

    Arguments:
        name: for people.
        config: its transformers configuration.
        path: folder of the weights that it begins with, or None.
        seed, allow, lora: what else its first weights depend on.
        checkpoint: folder of the trained weights, or None.
        step: optimiser steps that these had, or None.
        tokenizer: `bytes` or a folder.
    """

    name: str
    config: Any
    path: str | None
    seed: int
    allow: tuple[str, ...]
    lora: Lora | None
    checkpoint: Path | None
    step: int | None
    tokenizer: str


def source_of(settings: Settings) -> Source:
    """What `model.run` or `model.path` stands for. No collective.

    Raises ValueError naming the key for a folder that is neither, a run without a checkpoint, one whose engine's
    checkpoints only that engine can read, or keys of the configuration that do not exist.
    """
    changes = settings.values["model"].get("config") or {}
    if settings["model.path"] is not None:
        path = settings["model.path"]
        config, _ = configured(None, path, changes)
        return Source(
            Path(path).expanduser().resolve().name,
            config,
            path,
            0,
            (),
            None,
            None,
            None,
            _tokenizer(settings, path, BYTES),
        )
    return _run_of(settings, Path(settings["model.run"]).expanduser(), changes)


def _run_of(settings: Settings, folder: Path, changes: Mapping[str, Any]) -> Source:
    cfg, model = read_config(folder)
    if cfg is None or model is None:
        raise ValueError(f"model.run={str(folder)!r} holds no config.yaml and model.json of a training run")
    if cfg["engine"]["name"] != "fsdp2":
        raise ValueError(
            f"model.run={str(folder)!r} was trained with engine={cfg['engine']['name']}, whose checkpoints no "
            "other engine reads: export it, and give the exported folder as model.path"
        )
    found = newest_checkpoint(folder / "checkpoints")
    if found is None:
        raise ValueError(f"model.run={str(folder)!r} holds no complete checkpoint")
    config, _ = changed_config(config_of(model), changes)
    config.use_cache = False
    lora = lora_of(OmegaConf.create(cfg["model"]))
    path, allow = cfg["model"]["path"], tuple(cfg["model"]["allow_mismatch"] or ())
    own = cfg["data"].get("tokenizer", BYTES)
    # Without factors every weight is in the checkpoint, and the folder that training began with may be gone.
    path = path if lora is not None else None
    return Source(
        f"{cfg['model']['name']} after step {found[1].step}",
        config,
        path,
        cfg["run"]["seed"],
        allow if path is not None else (),
        lora,
        found[0],
        found[1].step,
        _tokenizer(settings, own, own),
    )


def _tokenizer(settings: Settings, own: str, otherwise: str) -> str:
    if settings["tokenizer"] != AUTO:
        return str(settings["tokenizer"])
    return own if own == BYTES or has_tokenizer(own) else otherwise


def open_model(source: Source, settings: Settings, mesh: SequenceMesh) -> nn.Module:
    """The model, parallelized on `mesh` and sharded over all its ranks, with its trained weights. Collective."""
    config, lora = source.config, source.lora

    def attach(model: nn.Module) -> None:
        parallelize(
            model,
            mesh,
            scheme=settings["parallel.scheme"],
            backend=settings["parallel.backend"],
            head_chunks=settings.values["parallel"].get("head_chunks"),
        )

    options = EngineOptions(
        empty=partial(empty_model, config, lora),
        load=partial(build_model, config, source.seed, source.path, list(source.allow), lora),
        attach=attach,
        device=mesh.device,
        dtype=settings.dtype,
        weight_decay=0.0,
        betas=(0.9, 0.95),
        eps=1e-8,
        clip=0.0,
        micro_steps=1,
        zero_stage=0,
    )
    model = build_engine("fsdp2", mesh, options).model
    if source.checkpoint is not None:
        load_trained(model, source.checkpoint)
    return model.eval()
