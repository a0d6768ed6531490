"""Refuses a configuration that cannot run, before any process group starts, naming the key and the numbers."""

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ringattn.kernels.registry import backends
from ringattn.parallel.mesh.shape import MeshShape, resolve_mesh
from ringattn.parallel.planning.options import check_scheme
from ringattn.training.corpus import Corpus, matching_files
from ringattn.training.engines.deepspeed import available as deepspeed_available

CHOICES: dict[str, tuple[str, ...]] = {
    "data.name": ("stdlib", "text"),
    "parallel.scheme": ("auto", "ring", "ulysses", "hybrid", "gather", "joint"),
    "parallel.policy": ("auto", "contiguous", "zigzag", "balanced"),
    "parallel.backend": ("auto", *backends()),
    "engine.name": ("fsdp2", "deepspeed"),
    "run.dtype": ("auto", "float32", "bfloat16"),
    "run.resume": ("auto", "force"),
}
# Smallest allowed value; None as a value of the configuration is allowed for the keys of OPTIONAL.
INTEGERS: dict[str, int] = {
    "data.seq_len": 1,
    "data.packs_per_step": 1,
    "data.prefetch": 1,
    "data.delay": 0,
    "parallel.data": 1,
    "parallel.ring": 1,
    "parallel.ulysses": 1,
    "parallel.head_chunks": 1,
    "run.steps": 1,
    "run.seed": 0,
    "run.save_every": 0,
    "run.keep": 1,
    "run.log_every": 1,
}
OPTIONAL = {"data.packs_per_step", "data.delay"}
OPTIONAL |= {"parallel.data", "parallel.ring", "parallel.ulysses", "parallel.head_chunks"}
# Allowed interval, both ends included.
NUMBERS: dict[str, tuple[float, float]] = {
    "optim.lr": (0.0, math.inf),
    "optim.warmup_ratio": (0.0, 1.0),
    "optim.min_ratio": (0.0, 1.0),
    "optim.weight_decay": (0.0, math.inf),
    "optim.eps": (0.0, math.inf),
    "optim.clip": (0.0, math.inf),
}
SWITCHES = ("data.pad", "engine.checkpoint_layers", "parallel.ulysses_across_nodes", "run.tensorboard")
# Keys that are checked elsewhere; below model.config every key of the transformers configuration is allowed.
OTHER_KEYS = {
    "model.name",
    "model.family",
    "model.path",
    "model.config",
    "data.files",
    "data.text_field",
    "data.tokenizer",
    "data.add_eos",
    "data.cache",
    "optim.betas",
    "engine.zero_stage",
    "run.output",
}
# What may differ between two starts in the same folder without changing the curve, beside `parallel` and most of `run`.
SAME_CURVE = {"data.prefetch", "data.cache", "engine.checkpoint_layers"}
CURVE_OF_RUN = ("run.seed", "run.steps", "run.dtype")


def validate(cfg: DictConfig, world_size: int, ranks_per_node: int, device_type: str) -> MeshShape:
    """The mesh of a configuration that can run with `world_size` ranks on `device_type` (cuda or cpu).

    Raises ValueError naming the key, what it holds and what it may hold.
    """
    _check_keys(cfg)
    _check_values(cfg)
    shape = _check_mesh(cfg, world_size, ranks_per_node)
    _check_device(cfg, device_type)
    _check_engine(cfg)
    _check_data(cfg, shape)
    if cfg.run.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("run.tensorboard=true needs the package: pip install tensorboard")
    return shape


def resolve(cfg: DictConfig, shape: MeshShape, device_type: str) -> dict[str, Any]:
    """The configuration as plain values, with what was left open filled in; this is what the output folder keeps."""
    resolved: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    resolved["parallel"].update(data=shape.data, ring=shape.ring, ulysses=shape.ulysses)
    resolved["data"]["packs_per_step"] = cfg.data.packs_per_step or shape.data
    if cfg.run.dtype == "auto":
        resolved["run"]["dtype"] = "bfloat16" if device_type == "cuda" else "float32"
    return resolved


def check_model(cfg: DictConfig, model_config: Any, corpus: Corpus) -> None:
    """Raises ValueError if the model's vocabulary or positions are too few for the data."""
    text = model_config.get_text_config()
    if corpus.vocab_size > text.vocab_size:
        raise ValueError(
            f"model.config.vocab_size={text.vocab_size} is less than the {corpus.vocab_size} tokens of "
            f"data.name={cfg.data.name}"
        )
    positions = getattr(text, "max_position_embeddings", None)
    longest = min(cfg.data.seq_len, corpus.longest)
    if positions is not None and longest > positions:
        raise ValueError(
            f"data.seq_len={cfg.data.seq_len} gives documents of {longest} tokens, the model has "
            f"model.config.max_position_embeddings={positions}; raise it (and the rotary base) if that is what you want"
        )


def curve_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Keys whose values would change the loss curve: (key, old value, new value). Absent and null are the same."""
    before, after = _flat(old), _flat(new)
    missing = "(absent)"
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return [(key, before.get(key, missing), after.get(key, missing)) for key in keys if _shapes_curve(key)]


def _shapes_curve(key: str) -> bool:
    group = key.split(".")[0]
    if group == "run":
        return key in CURVE_OF_RUN
    return group != "parallel" and key not in SAME_CURVE


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def _check_keys(cfg: DictConfig) -> None:
    """Hydra refuses a key that is not there, but `+key=value` adds one: a misspelt key must not pass unread."""
    known = {*CHOICES, *INTEGERS, *NUMBERS, *SWITCHES, *OTHER_KEYS}
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    unknown = [key for key in _flat(plain) if key not in known and not key.startswith("model.config.")]
    if unknown:
        raise ValueError(f"unknown key {', '.join(sorted(unknown))}; the keys are in configs/, each with a comment")


def _check_values(cfg: DictConfig) -> None:
    for key, allowed in CHOICES.items():
        if (value := OmegaConf.select(cfg, key)) not in allowed:
            raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")
    for key, smallest in INTEGERS.items():
        value = OmegaConf.select(cfg, key)
        if value is None and key in OPTIONAL:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
            raise ValueError(f"{key} must be an integer of at least {smallest}, got {value!r}")
    for key, (low, high) in NUMBERS.items():
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{key} must be a number from {low} to {high}, got {value!r}")
    for key in SWITCHES:
        if not isinstance(value := OmegaConf.select(cfg, key), bool):
            raise ValueError(f"{key} must be true or false, got {value!r}")
    betas = OmegaConf.to_container(cfg.optim.betas) if OmegaConf.is_list(cfg.optim.betas) else cfg.optim.betas
    good = isinstance(betas, list) and len(betas) == 2 and all(isinstance(b, int | float) and 0 <= b < 1 for b in betas)
    if not good:
        raise ValueError(f"optim.betas must be two numbers in [0, 1), got {betas!r}")


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
        raise ValueError(f"parallel.data, parallel.ring, parallel.ulysses: {error}") from None
    try:
        check_scheme(parallel.scheme, shape)
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
    if stage not in (1, 2, 3):
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
    if cfg.data.name != "text":
        return
    if not isinstance(cfg.data.add_eos, bool):
        raise ValueError(f"data.add_eos must be true or false, got {cfg.data.add_eos!r}")
    if not OmegaConf.is_list(cfg.data.files):
        raise ValueError(f"data.files must be a list, got {cfg.data.files!r}; write 'data.files=[/path/to/texts]'")
    if not cfg.data.files:
        raise ValueError("data.files is empty; give paths: data=text 'data.files=[/path/to/texts]'")
    matching_files(list(cfg.data.files))
    tokenizer = cfg.data.tokenizer
    if tokenizer != "bytes" and not Path(str(tokenizer)).expanduser().is_dir():
        raise ValueError(
            f"data.tokenizer={tokenizer!r} must be `bytes` or the folder of a saved Hugging Face tokenizer"
        )


def compute_dtype(resolved: Mapping[str, Any]) -> torch.dtype:
    """The torch dtype of a resolved configuration's `run.dtype`."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[resolved["run"]["dtype"]]
