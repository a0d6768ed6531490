"""The configuration of an evaluation, checked before any process group starts."""

import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ringattn.kernels.registry import backends
from ringattn.parallel.mesh.shape import MeshShape, resolve_mesh
from ringattn.parallel.planning.options import check_scheme, scheme_names
from ringattn.settings import AttentionOptions
from ringattn.training.config.checks import flat
from ringattn.training.data.tokenizer import AUTO, BYTES
from ringattn.training.start.launched import Launch

OF_TEXTS = ("position", "window", "logprobs")
OF_LENGTHS = ("needle", "multi_needle", "variable_tracking")
TASKS = (*OF_TEXTS, *OF_LENGTHS)
WORDINGS = ("ruler", "plain")
INTEGERS = {
    "samples": 1,
    "distractors": 0,
    "needles": 1,
    "asked": 1,
    "chains": 1,
    "hops": 1,
    "bins": 1,
    "max_length": 2,
    "pack": 1,
    "seed": 0,
    "texts.documents": 1,
    "parallel.data": 1,
    "parallel.ring": 1,
    "parallel.ulysses": 1,
    "parallel.head_chunks": 1,
}
OPTIONAL = {"max_length", "pack", "texts.documents", *(f"parallel.{name}" for name in ("data", "ring", "ulysses"))}
OPTIONAL |= {"parallel.head_chunks", "model.run", "model.path", "output"}
CHOICES = {
    "wording": WORDINGS,
    "dtype": ("auto", "float32", "bfloat16"),
    "parallel.scheme": scheme_names(),
    "parallel.policy": ("auto", "contiguous", "zigzag", "balanced"),
    "parallel.backend": ("auto", *backends()),
}
SWITCHES = ("generate", "parallel.ulysses_across_nodes")
TEXTS = ("model.run", "model.path", "output", "tokenizer", "texts.text_field", "texts.cache")
LISTS = ("tasks", "lengths", "depths", "windows", "texts.files")
KEYS = {*INTEGERS, *CHOICES, *SWITCHES, *TEXTS, *LISTS, "model.config"}


@dataclass(frozen=True)
class Settings:
    """A configuration that can run, with what was left open filled in.

    Arguments:
        values: plain values by their names, nested as in the file.
        shape: of the mesh.
        output: folder of the results.
        pack, max_length: tokens.
        dtype: of the computation.
    """

    values: dict[str, Any]
    shape: MeshShape
    output: Path
    pack: int
    max_length: int
    dtype: torch.dtype

    def __getitem__(self, key: str) -> Any:
        """A value by its full name, such as `texts.files`."""
        value: Any = self.values
        for part in key.split("."):
            value = value[part]
        return value


def settings_of(cfg: DictConfig, launch: Launch, device_type: str) -> Settings:
    """Checks a configuration. Raises ValueError naming the key, what it holds and what it may hold."""
    values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    found = flat(values)
    _check_keys(found)
    _check_values(found)
    _check_lists(found)
    _check_source(found)
    _check_together(found)
    longest = max(found["lengths"])
    return Settings(
        values,
        _mesh(found, launch),
        _output(found),
        found["pack"] or longest,
        found["max_length"] or longest,
        _dtype(found["dtype"], device_type),
    )


def _check_keys(found: Mapping[str, Any]) -> None:
    unknown = [key for key in found if key not in KEYS and not key.startswith("model.config")]
    if unknown:
        raise ValueError(f"unknown key {', '.join(sorted(unknown))}; the keys are in configs/evaluate.yaml")
    missing = sorted(KEYS - found.keys() - OPTIONAL - {"model.config"})
    if missing:
        raise ValueError(f"the configuration has no {', '.join(missing)}; each is in configs/evaluate.yaml")


def _check_values(found: Mapping[str, Any]) -> None:
    for key, smallest in INTEGERS.items():
        value = found.get(key)
        if value is None and key in OPTIONAL:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
            raise ValueError(f"{key} must be an integer of at least {smallest}, got {value!r}")
    for key, allowed in CHOICES.items():
        if found[key] not in allowed:
            raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {found[key]!r}")
    for key in SWITCHES:
        if not isinstance(found[key], bool):
            raise ValueError(f"{key} must be true or false, got {found[key]!r}")
    for key in TEXTS:
        value = found.get(key)
        if not (value is None and key in OPTIONAL) and not (isinstance(value, str) and value):
            raise ValueError(f"{key} must be text, got {value!r}")


def _check_lists(found: Mapping[str, Any]) -> None:
    for key in LISTS:
        if not isinstance(found[key], list) or (not found[key] and key != "texts.files"):
            raise ValueError(f"{key} must be a list that is not empty, got {found[key]!r}; write '{key}=[...]'")
    for one in found["tasks"]:
        if one not in TASKS:
            raise ValueError(f"tasks must be some of {', '.join(TASKS)}, got {one!r}")
    for key, smallest in (("lengths", 1), ("windows", 1)):
        for one in found[key]:
            if not isinstance(one, int) or isinstance(one, bool) or one < smallest:
                raise ValueError(f"{key} must be integers of at least {smallest}, got {one!r}")
    for one in found["depths"]:
        number = isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one)
        if not number or not 0 <= one <= 1:
            raise ValueError(f"depths must be numbers from 0 to 1, got {one!r}")
    for one in found["texts.files"]:
        if not isinstance(one, str) or not one:
            raise ValueError(f"texts.files must be a list of texts, got {one!r} in it")


def _check_source(found: Mapping[str, Any]) -> None:
    run, path = found.get("model.run"), found.get("model.path")
    if (run is None) == (path is None):
        told = "neither" if run is None else f"both {run!r} and {path!r}"
        raise ValueError(f"model.run (a training run) or model.path (a saved model) must be given, got {told}")
    key, value = ("model.run", run) if path is None else ("model.path", path)
    if not Path(str(value)).expanduser().is_dir():
        raise ValueError(f"{key}={value!r} is no folder")
    source = found["tokenizer"]
    if source not in (AUTO, BYTES) and not Path(source).expanduser().is_dir():
        raise ValueError(f"tokenizer={source!r} must be `auto`, `bytes` or the folder of a saved tokenizer")


def _check_together(found: Mapping[str, Any]) -> None:
    needing = [task for task in found["tasks"] if task in OF_TEXTS]
    if needing and not found["texts.files"]:
        raise ValueError(f"tasks: {', '.join(needing)} need texts: give paths: 'texts.files=[/path/to/texts]'")
    if found["asked"] > found["needles"]:
        raise ValueError(f"asked={found['asked']} must be at most needles={found['needles']}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("pictures need matplotlib: pip install 'ringattn[train]'")


def _mesh(found: Mapping[str, Any], launch: Launch) -> MeshShape:
    try:
        shape = resolve_mesh(
            launch.world_size,
            data=found.get("parallel.data"),
            ring=found.get("parallel.ring"),
            ulysses=found.get("parallel.ulysses"),
            ranks_per_node=launch.ranks_per_node,
            ulysses_across_nodes=found["parallel.ulysses_across_nodes"],
        )
        check_scheme(AttentionOptions(scheme=found["parallel.scheme"]), shape)
    except ValueError as error:
        raise ValueError(f"parallel: {error}") from None
    return shape


def _output(found: Mapping[str, Any]) -> Path:
    if found.get("output") is not None:
        folder = Path(found["output"])
    elif found.get("model.run") is not None:
        folder = Path(found["model.run"]) / "evaluation"
    else:
        folder = Path("outputs") / f"evaluation-{Path(os.path.abspath(found['model.path'])).name}"
    folder = folder.expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output={str(folder)!r} is a file; it must be a folder")
    return folder


def _dtype(name: str, device_type: str) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device_type == "cuda" else "float32"
    if name == "bfloat16" and device_type != "cuda":
        raise ValueError("dtype=bfloat16 needs GPUs and this machine has none; use float32 or auto")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
