"""Refuses a configuration that cannot run, before any process group starts, naming the key and the numbers."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ringattn.kernels.registry import backends
from ringattn.parallel.mesh.shape import MeshShape, resolve_mesh
from ringattn.parallel.planning.options import check_scheme
from ringattn.settings import AttentionOptions
from ringattn.training.checks.determinism import check_backend
from ringattn.training.config import memory_keys as memory
from ringattn.training.config import optim
from ringattn.training.config.data_keys import OF_SOURCES, check_data_keys, settled
from ringattn.training.config.keys import (
    CHOICES,
    INTEGERS,
    KEYS,
    LARGEST,
    NESTED,
    NUMBERS,
    OF_DEEPSPEED,
    OF_TEXT,
    OPTIONAL,
    SWITCHES,
    TEXTS,
)
from ringattn.training.data.files import matching_files
from ringattn.training.data.tokenizer import AUTO, BYTES, has_tokenizer
from ringattn.training.engines.deepspeed import available as deepspeed_available
from ringattn.training.model.lora import check_lora, lora_of, lora_values
from ringattn.training.model.rope import rope_of, rope_values
from ringattn.training.packs.ordering import AnyCorpus
from ringattn.training.report.profile import check_window
from ringattn.training.report.trackers import check_trackers


def completed(cfg: DictConfig) -> DictConfig:
    """The configuration with null for every key that may be left out.

    Raises ValueError for a key that does not exist, and for one that must be there.
    """
    plain: dict[str, Any] = OmegaConf.to_container(cfg)  # type: ignore[assignment]
    given = {name for key in flat(plain) for name in _and_above(key)}
    known = KEYS | {*OF_TEXT, *OF_DEEPSPEED, *optim.OF_MUON} | OF_SOURCES
    unknown = [key for key in flat(plain) if key not in known and not key.startswith(NESTED)]
    if unknown:
        raise ValueError(f"unknown key {', '.join(sorted(unknown))}; the keys are in configs/, each with a comment")
    needed = KEYS - OPTIONAL
    needed |= set(OF_TEXT) if OmegaConf.select(cfg, "data.name") == "text" else set()
    needed |= OF_SOURCES if OmegaConf.select(cfg, "data.name") == "sources" else set()
    needed |= set(OF_DEEPSPEED) if OmegaConf.select(cfg, "engine.name") == "deepspeed" else set()
    needed |= set(optim.OF_MUON) if OmegaConf.select(cfg, "optim.name") == "muon" else set()
    if missing := sorted(needed - given):
        raise ValueError(f"the configuration has no {', '.join(missing)}; each is in a file of configs/")
    cfg = cfg.copy()
    for key in sorted(OPTIONAL - given):
        if OmegaConf.select(cfg, key) is None:
            OmegaConf.update(cfg, key, None, force_add=True)
    return cfg


def validate(cfg: DictConfig, world_size: int, ranks_per_node: int, device_type: str) -> MeshShape:
    """The mesh of a configuration that can run with `world_size` ranks on `device_type` (cuda or cpu).

    Raises ValueError naming the key, what it holds and what it may hold.
    """
    cfg = completed(cfg)
    _check_values(cfg)
    _check_model_keys(cfg)
    shape = _check_mesh(cfg, world_size, ranks_per_node)
    _check_device(cfg, device_type)
    _check_engine(cfg)
    memory.check_memory(cfg, device_type)
    optim.check_optim(cfg)
    _check_data(cfg, shape)
    run: Any = OmegaConf.to_container(cfg.run)
    check_trackers(run["trackers"], run["tensorboard"])
    check_window(run["profile"])
    if cfg.run.deterministic:
        check_backend(cfg.parallel.backend)
    if 0 < cfg.run.spike <= 1:
        raise ValueError(f"run.spike must be 0 or a factor above 1, got {cfg.run.spike}: every loss would be one")
    return shape


def check_data(cfg: DictConfig) -> MeshShape:
    """The mesh that a configuration asks for, if its data can be read and packed; nothing else is looked at.

    Raises ValueError as `validate` does.
    """
    cfg = completed(cfg)
    _check_values(cfg)
    _check_model_keys(cfg)
    data, ring, ulysses = (cfg.parallel[name] or 1 for name in ("data", "ring", "ulysses"))
    shape = resolve_mesh(data * ring * ulysses, data=data, ring=ring, ulysses=ulysses, ulysses_across_nodes=True)
    _check_data(cfg, shape)
    return shape


def resolve(cfg: DictConfig, shape: MeshShape, device_type: str) -> dict[str, Any]:
    """The configuration as plain values, with what was left open filled in; this is what the output folder keeps."""
    cfg = completed(cfg)
    resolved: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    resolved["parallel"].update(data=shape.data, ring=shape.ring, ulysses=shape.ulysses)
    resolved["data"]["packs_per_step"] = cfg.data.packs_per_step or shape.data
    resolved["data"].update(settled(resolved["data"], cfg.data))
    if cfg.model.path is not None:
        resolved["model"]["path"] = os.path.abspath(os.path.expanduser(cfg.model.path))
    resolved["model"]["config"] = resolved["model"]["config"] or {}
    resolved["model"]["allow_mismatch"] = resolved["model"]["allow_mismatch"] or []
    resolved["model"]["lora"] = lora_values(lora_of(cfg.model))
    resolved["model"]["rope"] = rope_values(rope_of(cfg.model))
    resolved["model"]["freeze"] = resolved["model"]["freeze"] or []
    if cfg.optim.lr is None:
        resolved["optim"]["lr"] = cfg.model.lr if cfg.model.path is None else cfg.model.lr_from_path
    if cfg.data.get("tokenizer") == AUTO:
        own = cfg.model.path is not None and has_tokenizer(cfg.model.path)
        resolved["data"]["tokenizer"] = resolved["model"]["path"] if own else BYTES
    if cfg.run.dtype == "auto":
        resolved["run"]["dtype"] = "bfloat16" if device_type == "cuda" else "float32"
    return resolved


def check_vocabulary(cfg: DictConfig, model_config: Any, tokens: int) -> None:
    """Raises ValueError if the model's vocabulary is smaller than that of the data."""
    known = model_config.get_text_config().vocab_size
    if tokens > known:
        raise ValueError(f"model.config.vocab_size={known} is less than the {tokens} tokens of {_tokens_of(cfg)}")


def _tokens_of(cfg: DictConfig) -> str:
    tokenizer = cfg.data.get("tokenizer")
    return f"data.name={cfg.data.name}" if tokenizer is None else f"data.tokenizer={tokenizer}"


def check_positions(cfg: DictConfig, model_config: Any, corpus: AnyCorpus) -> None:
    """Raises ValueError if the model has fewer positions than the longest document of a pack."""
    text = model_config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    longest = min(cfg.data.seq_len, corpus.longest)
    if positions is not None and longest > positions:
        raise ValueError(
            f"data.seq_len={cfg.data.seq_len} gives documents of {longest} tokens, the model has "
            f"model.config.max_position_embeddings={positions}; raise it (and the rotary base) if that is what you want"
        )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their full names, as in `data.seq_len`."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _and_above(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _check_values(cfg: DictConfig) -> None:
    for key, allowed in CHOICES.items():
        if (value := OmegaConf.select(cfg, key)) not in allowed:
            raise ValueError(f"{key} must be one of {', '.join(map(_written, allowed))}, got {value!r}")
    for key, smallest in INTEGERS.items():
        value = OmegaConf.select(cfg, key)
        if value is None and key in OPTIONAL:
            continue
        largest = LARGEST.get(key)
        if not _is_integer(value) or value < smallest or (largest is not None and value > largest):
            most = "" if largest is None else f" and at most {largest}"
            raise ValueError(f"{key} must be an integer of at least {smallest}{most}, got {value!r}")
    for key, (low, high) in NUMBERS.items():
        value = OmegaConf.select(cfg, key)
        if value is None and key in OPTIONAL:
            continue
        if not _is_number(value) or not low <= value <= high:
            raise ValueError(f"{key} must be a finite number from {low} to {high}, got {value!r}")
    for key in SWITCHES:
        if not isinstance(value := OmegaConf.select(cfg, key), bool):
            raise ValueError(f"{key} must be true or false, got {value!r}")
    for key in TEXTS:
        _check_text(cfg, key)
    if ".." in Path(cfg.model.name).parts:  # the default of run.output has it
        raise ValueError(f"model.name must not lead out of the folder of outputs, got {cfg.model.name!r}")
    if (value := cfg.run.hang_after) != "auto" and not (_is_number(value) and value >= 1):
        raise ValueError(f"run.hang_after must be auto or a number of seconds of at least 1, got {value!r}")


def _written(value: str | bool) -> str:
    """As it is written in YAML."""
    return str(value).lower() if isinstance(value, bool) else value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _check_text(cfg: DictConfig, key: str) -> None:
    value = OmegaConf.select(cfg, key)
    if (value is None and key in OPTIONAL) or (isinstance(value, str) and value):
        return
    hint = f"; write \"{key}='{value}'\"" if isinstance(value, int | float) else ""
    raise ValueError(f"{key} must be text, got {value!r}{hint}")


def _check_texts(cfg: DictConfig, key: str, example: str) -> None:
    value = OmegaConf.select(cfg, key)
    if value is None and key in OPTIONAL:
        return
    if not OmegaConf.is_list(value):
        raise ValueError(f"{key} must be a list, got {value!r}; write '{key}=[{example}]'")
    for one in value:
        if not isinstance(one, str) or not one:
            raise ValueError(f"{key} must be a list of texts, got {one!r} in it; write '{key}=[{example}]'")


def _check_model_keys(cfg: DictConfig) -> None:
    model = cfg.model
    if model.config is not None and not OmegaConf.is_dict(model.config):
        raise ValueError(f"model.config must hold keys of the transformers configuration, got {model.config!r}")
    _check_texts(cfg, "model.allow_mismatch", "lm_head.*")
    if model.allow_mismatch and model.path is None:
        raise ValueError("model.allow_mismatch is about the weights at model.path, which is null")
    check_lora(cfg)
    rope_of(cfg.model)
    _check_texts(cfg, "model.freeze", "'*.embed_tokens.*'")
    rate = "model.lr" if model.path is None else "model.lr_from_path"
    if cfg.optim.lr is None and OmegaConf.select(cfg, rate) is None:
        raise ValueError(f"optim.lr is null, and so is {rate}, which it would be; give one of them")


def _check_mesh(cfg: DictConfig, world_size: int, ranks_per_node: int) -> MeshShape:
    parallel = cfg.parallel
    data, ring = parallel.data, parallel.ring
    if parallel.scheme == "ulysses" and ring is None:
        # It cannot use a ring: left open, all ranks exchange heads.
        ring = 1
        data = 1 if data is None and parallel.ulysses is None else data
    try:
        shape = resolve_mesh(
            world_size,
            data=data,
            ring=ring,
            ulysses=parallel.ulysses,
            ranks_per_node=ranks_per_node,
            ulysses_across_nodes=parallel.ulysses_across_nodes,
        )
    except ValueError as error:
        hint = "run.elastic=true lets sizes that do not fit give way"
        raise ValueError(f"parallel.data, parallel.ring, parallel.ulysses: {error}; {hint}") from None
    try:
        check_scheme(AttentionOptions(scheme=parallel.scheme), shape)
    except ValueError as error:
        raise ValueError(f"parallel.scheme={parallel.scheme}: {error}") from None
    return shape


def _check_device(cfg: DictConfig, device_type: str) -> None:
    if device_type == "cuda":
        if cfg.parallel.backend == "cpu":
            raise ValueError("parallel.backend=cpu does not run on GPUs; use auto")
        return
    if cfg.run.dtype == "bfloat16":
        raise ValueError("run.dtype=bfloat16 needs GPUs and this machine has none; use float32 or auto")
    devices = () if cfg.parallel.backend == "auto" else backends()[cfg.parallel.backend].capability.devices
    if devices and "cpu" not in devices:
        raise ValueError(
            f"parallel.backend={cfg.parallel.backend} needs GPUs and this machine has none; use auto, cpu or reference"
        )


def _check_engine(cfg: DictConfig) -> None:
    if cfg.engine.name != "deepspeed":
        return
    if not deepspeed_available():
        raise ValueError("engine=deepspeed needs the package: pip install 'ringattn[deepspeed]', or use engine=fsdp2")
    stage = cfg.engine.zero_stage
    if not _is_integer(stage) or stage not in (1, 2, 3):
        raise ValueError(f"engine.zero_stage must be 1, 2 or 3, got {stage!r}")


def _check_data(cfg: DictConfig, shape: MeshShape) -> None:
    packs = cfg.data.packs_per_step
    if packs is not None and packs % shape.data:
        raise ValueError(
            f"data.packs_per_step={packs} must be a multiple of the {shape.data} data-parallel replicas "
            "(parallel.data): every replica computes the same number of packs"
        )
    if cfg.data.delay is not None:
        if cfg.data.pad:
            raise ValueError(f"data.delay={cfg.data.delay} fills every pack exactly; use data.pad=false")
        if (packs or shape.data) == 1:
            raise ValueError(
                f"data.delay={cfg.data.delay} evens out the packs of a step, and this one has a single pack; use "
                "data.delay=null, or raise data.packs_per_step or parallel.data"
            )
    check_data_keys(cfg.data)
    if cfg.data.name != "text":
        return
    if not isinstance(cfg.data.add_eos, bool):
        raise ValueError(f"data.add_eos must be true or false, got {cfg.data.add_eos!r}")
    _check_texts(cfg, "data.files", "/path/to/texts")
    if not cfg.data.files:
        raise ValueError("data.files is empty; give paths: data=text 'data.files=[/path/to/texts]'")
    for key in ("data.text_field", "data.tokenizer", "data.cache"):
        _check_text(cfg, key)
    matching_files(list(cfg.data.files))
    tokenizer = cfg.data.tokenizer
    if tokenizer not in (AUTO, BYTES) and not Path(tokenizer).expanduser().is_dir():
        raise ValueError(
            f"data.tokenizer={tokenizer!r} must be `auto`, `bytes` or the folder of a saved Hugging Face tokenizer"
        )


def compute_dtype(resolved: Mapping[str, Any]) -> torch.dtype:
    """The torch dtype of a resolved configuration's `run.dtype`."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[resolved["run"]["dtype"]]
