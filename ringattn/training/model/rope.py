"""`model.rope`: rotary positions for longer documents than the model was made for.

Each kind is transformers' own (`rope_parameters`), so that whoever loads the model later computes the same:
    linear  positions are divided by the factor (Chen et al., arXiv 2306.15595)
    yarn    low frequencies are divided, high ones stay, attention is tempered (Peng et al., arXiv 2309.00071)
    llama3  low frequencies are divided, high ones stay, as Llama 3.1 was made (arXiv 2407.21783)
    theta   another base and nothing else, as ProLong does it (arXiv 2410.02660)
What was saved of another kind does not stay beside it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

KINDS = ("linear", "yarn", "llama3", "theta")
SHAPE = (
    "null, {type: theta, theta: 1.28e8} or {type: yarn, factor: 4.0}; type is linear, yarn, llama3 or theta, and "
    "factor, theta and original are its numbers"
)
# What Llama 3.1 was published with; other values are keys of model.config.rope_parameters.
_OF_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@dataclass(frozen=True)
class Rope:
    """Rotary positions of a longer context.

    Arguments:
        kind: one of `KINDS`.
        factor: how many times as many positions as `original`; None: as many as a pack has tokens. Not of theta.
        theta: base of the frequencies; None: the saved one.
        original: positions that the model was made for; None: what its configuration says.
    """

    kind: str
    factor: float | None = None
    theta: float | None = None
    original: int | None = None


def rope_of(model: Mapping[str, Any] | DictConfig) -> Rope | None:
    """What the `model` group of a configuration says, or None. Raises ValueError naming the key."""
    given = model.get("rope")
    given = OmegaConf.to_container(given) if OmegaConf.is_config(given) else given
    if given is None:
        return None
    if not isinstance(given, Mapping) or not {"type"} <= given.keys() <= {"type", "factor", "theta", "original"}:
        raise ValueError(f"model.rope must be {SHAPE}; got {given!r}")
    kind, factor, theta, original = (given.get(key) for key in ("type", "factor", "theta", "original"))
    if kind not in KINDS:
        raise ValueError(f"model.rope.type must be one of {', '.join(KINDS)}, got {kind!r}")
    for key, value, low in (("factor", factor, 1.0), ("theta", theta, 1.0)):
        if value is not None and not (_is_number(value) and low <= value < math.inf):
            raise ValueError(f"model.rope.{key} must be a finite number of at least {low:g}, got {value!r}")
    if original is not None and not (isinstance(original, int) and not isinstance(original, bool) and original > 0):
        raise ValueError(f"model.rope.original must be an integer above 0, got {original!r}")
    if kind == "theta" and theta is None:
        raise ValueError("model.rope.type=theta needs model.rope.theta, the base of the frequencies")
    for key, value in (("factor", factor), ("original", original)):
        if kind == "theta" and value is not None:
            raise ValueError(f"model.rope.{key} is not for model.rope.type=theta, which scales nothing; leave it out")
    return Rope(kind, factor, theta, original)


def rope_values(rope: Rope | None) -> dict[str, Any] | None:
    """The key of a resolved configuration."""
    if rope is None:
        return None
    return {"type": rope.kind, "factor": rope.factor, "theta": rope.theta, "original": rope.original}


def rope_overrides(config: Any, rope: Rope, tokens: int) -> dict[str, Any]:
    """The keys of a transformers configuration that give it these rotary positions.

    Arguments:
        config: as it is without them.
        tokens: of a pack, which no document of it exceeds.

    Raises ValueError for a model that has none, or has several.
    """
    saved = _saved_parameters(config)
    theta = float(rope.theta if rope.theta is not None else saved["rope_theta"])
    parameters: dict[str, Any] = {"rope_theta": theta}
    if "partial_rotary_factor" in saved:
        parameters["partial_rotary_factor"] = saved["partial_rotary_factor"]
    known = config.max_position_embeddings
    if rope.kind == "theta":
        parameters["rope_type"] = "default"
        return {"rope_parameters": parameters, "max_position_embeddings": max(known, tokens)}
    original = rope.original or saved.get("original_max_position_embeddings") or known
    factor = float(rope.factor if rope.factor is not None else max(1.0, tokens / original))
    parameters |= {"rope_type": rope.kind, "factor": factor}
    if rope.kind != "linear":
        parameters["original_max_position_embeddings"] = original
    if rope.kind == "llama3":
        parameters |= _OF_LLAMA3
    return {"rope_parameters": parameters, "max_position_embeddings": math.floor(factor * original)}


def _saved_parameters(config: Any) -> dict[str, Any]:
    name = type(config).__name__
    saved = getattr(config, "rope_parameters", None)
    if not isinstance(saved, dict) or not hasattr(config, "max_position_embeddings"):
        raise ValueError(f"model.rope: {name} has no rotary positions in its configuration")
    if "rope_theta" not in saved:
        raise ValueError(
            f"model.rope: {name} has other rotary positions for each kind of layer ({', '.join(sorted(saved))}); set "
            "model.config.rope_parameters.<kind>.… and model.config.max_position_embeddings instead"
        )
    kind = saved.get("rope_type", "default")
    if kind not in ("default", "linear", "yarn", "llama3", "dynamic"):
        raise ValueError(
            f"model.rope: {name} has rotary positions of type {kind!r}, which only it has; set "
            "model.config.rope_parameters.… instead"
        )
    return saved


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
