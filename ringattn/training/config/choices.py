"""What a user chose of the model, told apart from the shape that an option of the `model` group brings along."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf


def chosen_by_user(cfg: DictConfig) -> frozenset[str]:
    """Full names of the `model` keys that the user set: on the command line, or in a configuration file of their own.

    Keys that come from an option of the group (`model=llama_8b`) are not among them, unless the option itself names a
    path: then it was written for the model there. Call it inside of a `hydra.main`.
    """
    app = HydraConfig.get()
    option = app.runtime.choices.get("model")
    typed = OverridesParser.create().parse_overrides(list(app.overrides.task))
    if option is None:
        return _leaves({"model": cfg.get("model")})
    groups = [str(one.input_line) for one in typed if _is_option(one) and one.key_or_group != "model"]
    # The same configuration without the option: what is left of `model` stands in the user's own files.
    paths = [one for one in app.overrides.hydra if one.startswith("hydra.searchpath=")]
    others = hydra.compose(app.job.config_name, ["~model", *groups, *paths])
    return chosen(cfg, typed, others)


def chosen(cfg: DictConfig, typed: Sequence[Override], others: DictConfig) -> frozenset[str]:
    """The keys of `chosen_by_user`, from the parsed command line and the configuration without the group's option."""
    keys = _leaves({"model": others.get("model")})
    for one in typed:
        if not one.is_delete():
            keys |= _leaves({one.key_or_group: one.value()})
    keys = frozenset(key for key in keys if key.startswith("model."))
    if OmegaConf.select(cfg, "model.path") is not None and "model.path" not in keys:
        return _leaves({"model": cfg.model})
    return keys


def with_saved_model(cfg: DictConfig, keys: Collection[str] | None) -> DictConfig:
    """The configuration where a model is loaded: `model.config` keeps only what the user chose, so that what was saved
    counts for the rest, and the name is that of the folder.

    Arguments:
        keys: those of `chosen_by_user`; None for all keys of `model`.
    """
    path = OmegaConf.select(cfg, "model.path")
    if keys is None or not isinstance(path, str):
        return cfg
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    if isinstance(cfg.model.get("config"), DictConfig):
        cfg.model.config = _kept(cfg.model.config, "model.config.", keys)
    if "model.family" not in keys:
        cfg.model.family = None
    if "model.name" not in keys:
        cfg.model.name = Path(path).expanduser().resolve().name or "model"
    return cfg


def _is_option(one: Override) -> bool:
    """Whether an override picks (or deletes) an option of a group: all keys of the recipe stand inside of groups."""
    return "." not in one.key_or_group and (one.is_delete() or not isinstance(one.value(), Mapping))


def _kept(values: DictConfig, prefix: str, keys: Collection[str]) -> dict[str, Any]:
    """The part of nested values whose full names are among the keys."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix + str(key)
        if isinstance(value, DictConfig) and name not in keys:
            if inner := _kept(value, f"{name}.", keys):
                kept[str(key)] = inner
        elif name in keys:
            kept[str(key)] = value
    return kept


def _leaves(values: Mapping[str, Any], prefix: str = "") -> frozenset[str]:
    """Full names of the values in nested mappings."""
    found: set[str] = set()
    for key, value in values.items():
        if isinstance(value, Mapping | DictConfig) and value:
            found |= _leaves(value, f"{prefix}{key}.")
        else:
            found.add(f"{prefix}{key}")
    return frozenset(found)
