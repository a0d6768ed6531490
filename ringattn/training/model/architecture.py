"""The configuration of a model: a new one's, or a saved one's with the user's changes."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringattn.training.model.rope import Rope, rope_overrides

# The configuration class of each `model.family`.
FAMILIES = {
    "llama": "LlamaConfig",
    "qwen3": "Qwen3Config",
}

# Keys of a transformers configuration that the recipe decides, and where to say it instead.
DECIDED = {
    "dtype": "weights are float32, and run.dtype says what is computed in",
    "torch_dtype": "weights are float32, and run.dtype says what is computed in",
    "use_cache": "training has no cache",
    "attn_implementation": "attention is ringattn's",
    "_attn_implementation": "attention is ringattn's",
    "model_type": "model.family or model.path says it",
    "architectures": "the recipe trains the causal language model of model.family or model.path",
    "quantization_config": "quantized weights cannot be trained",
}
# Another rope_type keeps these; the others belong to the type that was saved.
_OF_EVERY_ROTARY_TYPE = ("rope_type", "rope_theta", "partial_rotary_factor")


@dataclass(frozen=True)
class Change:
    """A key of a saved configuration that the user set to another value."""

    key: str
    saved: Any
    value: Any

    def __str__(self) -> str:
        return f"{self.key} {self.saved!r} → {self.value!r}"


def saved_config(path: str) -> Any:
    """The transformers configuration in a folder. Raises ValueError naming `model.path` if there is none to train."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        what = "is a PEFT adapter without its model: merge them first" if adapter else "holds no config.json"
        raise ValueError(f"model.path={path!r} {what}; it must be the folder of a saved model")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a broken file leads to
        raise ValueError(f"model.path={path!r}: config.json cannot be read: {reason_of(error)}") from None
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"model.path={path!r} holds a {config.model_type}, which is no causal language model")
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"model.path={path!r} holds quantized weights (quantization_config in config.json), which cannot be "
            "trained; save it in bfloat16 or float32 first"
        )
    return config


def changed_config(config: Any, overrides: Mapping[str, Any]) -> tuple[Any, tuple[Change, ...]]:
    """A configuration with some keys changed, nested ones by nested mappings, and what differs now.

    Raises ValueError for a key that the configuration has not, and for values that it does not take.
    """
    values = config.to_dict()
    changes = tuple(_merge(values, overrides, "model.config.", config))
    if any(change.key.endswith("tie_word_embeddings") and change.value for change in changes):
        raise ValueError("model.config.tie_word_embeddings=true: the saved model has an output head of its own")
    if not changes:
        return config, ()
    with _refusing(", ".join(change.key for change in changes), type(config)):
        return type(config).from_dict(values), changes


def configured(
    family: str | None, path: str | None, overrides: Mapping[str, Any], rope: Rope | None = None, tokens: int = 0
) -> tuple[Any, tuple[Change, ...]]:
    """A transformers configuration, and what the overrides changed in a saved one.

    Arguments:
        family: `llama` or `qwen3`, of a new model.
        path: the folder of a saved model, whose configuration counts but for the overrides. None for a new model, whose
            keys are the overrides, the rest being those of the family.
        rope: rotary positions in the place of its own. Positions that the overrides name count all the same.
        tokens: of a pack, for `rope`.

    Raises ValueError for a family, a folder or a key of the configuration that does not exist, and for values that it
    does not take.
    """
    if decided := sorted(DECIDED.keys() & overrides.keys()):
        raise ValueError(f"model.config.{decided[0]} cannot be set: {DECIDED[decided[0]]}")
    changes: tuple[Change, ...] = ()
    if path is None:
        config = _new_config(family, overrides)
        if rope is not None:
            longer = rope_overrides(config, rope, tokens)
            longer["max_position_embeddings"] = max(longer["max_position_embeddings"], config.max_position_embeddings)
            config, _ = changed_config(config, longer)
    else:
        config = saved_config(path)
        if rope is not None:
            overrides = _beside_rope(overrides, rope_overrides(config, rope, tokens))
        config, changes = changed_config(config, overrides)
    config.use_cache = False  # a cache makes stock packing leak across documents
    return config, changes


def _beside_rope(overrides: Mapping[str, Any], longer: Mapping[str, Any]) -> dict[str, Any]:
    if twice := sorted({"rope_parameters", "rope_scaling", "rope_theta"} & overrides.keys()):
        raise ValueError(f"model.config.{twice[0]} and model.rope both say what rotary positions are; give one of them")
    return {**longer, **overrides}


def longer_without_rope(changes: Iterable[Change]) -> str:
    """A warning if a saved model gets more positions and its rotary ones stay as they are; else ""."""
    changed = {change.key: change for change in changes}
    more = changed.get("model.config.max_position_embeddings")
    if more is None or more.value <= more.saved or any(".rope_parameters" in key for key in changed):
        return ""
    return (
        f"warning: the model was made for {more.saved:,} positions and is given {more.value:,} without a change of its "
        "rotary ones: beyond, it knows none of them. model.rope={type: yarn} or {type: theta, theta: ...} scales them"
    )


def check_family(family: str, path: str, config: Any) -> None:
    """Raises ValueError if what is saved at `path` is of another family."""
    if type(config) is not type(_new_config(family, {})):
        raise ValueError(f"model.family={family}, but model.path={path!r} holds a {config.model_type}: leave it out")


def _new_config(family: str | None, values: Mapping[str, Any]) -> Any:
    import transformers

    if family not in FAMILIES:
        raise ValueError(f"model.family must be one of {', '.join(sorted(FAMILIES))}, got {family!r}")
    kind = getattr(transformers, FAMILIES[family])
    known = kind()
    for key in values:
        if not hasattr(known, key):
            raise ValueError(f"model.config.{key}: {kind.__name__} has no such key")
    with _refusing("model.config", kind):
        return kind(**values)  # derived fields (head_dim, layer types) are computed from the final values


@contextmanager
def _refusing(keys: str, kind: type) -> Iterator[None]:
    """What transformers refuses, or only warns of, about a configuration as a ValueError that names the keys."""
    try:
        with _rotary_warnings() as warnings:
            yield
    except Exception as error:  # of the checks of each model's configuration: of any type
        raise ValueError(f"{keys}: {kind.__name__} cannot have this: {reason_of(error)}") from None
    for warning in warnings:
        if warning.startswith(("Unrecognized keys", "Missing validation function")):
            raise ValueError(f"{keys}: {warning}")


@contextmanager
def _rotary_warnings() -> Iterator[list[str]]:
    """Collects what transformers says about rotary keys that it does not read, such as misspelt ones."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.modeling_rope_utils")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _merge(values: dict[str, Any], overrides: Mapping[str, Any], prefix: str, config: Any) -> Iterator[Change]:
    """Sets the overrides in nested values; yields what changed."""
    for name, value in overrides.items():
        key = {"rope_scaling": "rope_parameters", **getattr(config, "attribute_map", {})}.get(name, name)
        if key not in values and not hasattr(config, key):
            raise ValueError(f"{prefix}{name}: {type(config).__name__} has no such key")
        before = values.get(key, getattr(config, key, None))
        if isinstance(value, Mapping) and isinstance(before, dict):
            inner = getattr(config, key, None)
            if hasattr(inner, "to_dict"):
                yield from _merge(before, value, f"{prefix}{name}.", inner)
            else:
                yield from _merge_plain(before, value, f"{prefix}{name}.")
        elif value != before:
            yield Change(prefix + name, before, value)
            values[key] = value


def _merge_plain(values: dict[str, Any], overrides: Mapping[str, Any], prefix: str) -> Iterator[Change]:
    """The same for a dictionary that may have any keys, such as those of rotary scalings."""
    if overrides.get("rope_type", values.get("rope_type")) != values.get("rope_type"):
        for name in [name for name in values if name not in _OF_EVERY_ROTARY_TYPE and name not in overrides]:
            yield Change(prefix + name, values.pop(name), None)
    for name, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(values.get(name), dict):
            yield from _merge_plain(values[name], value, f"{prefix}{name}.")
        elif name not in values or value != values[name]:
            yield Change(prefix + name, values.get(name), value)
            values[name] = value


def reason_of(error: BaseException) -> str:
    """An exception of a library in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)}"[:400]
