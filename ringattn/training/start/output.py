"""The folder of a run: whether it can be written to, and what it keeps of the run's configuration."""

import errno
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ringattn.training.checkpoint.folders import remove_partial
from ringattn.training.health.lock import is_free
from ringattn.training.secrets import redacted

CONFIG, MODEL = "config.yaml", "model.json"
_FLOAT = "__float__"
# Not of the model, but of how it is stored and by what.
_OF_STORING = ("architectures", "dtype", "torch_dtype", "transformers_version")


def check_output(output: Path, given: str, write: bool) -> None:
    """Raises ValueError if `output` is no folder, leads out of itself or, with `write`, cannot be written to. It is not
    made."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"run.output={given} is a file; it must be a folder")
    _check_stays_inside(output, given)
    if not write:
        return
    folder = output / "checkpoints"
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    # A save that was killed may be what fills the disk.
    for attempt in ("as it is", "without what it left"):
        try:
            with tempfile.TemporaryFile(dir=existing) as probe:
                probe.write(bytes(4096))
            return
        except OSError as error:
            if attempt == "as it is" and error.errno == errno.ENOSPC and is_free(output):
                remove_partial(folder)
                continue
            raise ValueError(f"run.output={given}: nothing can be written in {existing}: {error.strerror}") from None


def _check_stays_inside(output: Path, given: str) -> None:
    """A run writes to its folder alone: neither a link in it nor a folder in that may lead elsewhere."""
    inside = [*output.iterdir()] if output.is_dir() else []
    inside += [path for folder in inside if folder.is_dir() and not folder.is_symlink() for path in folder.iterdir()]
    for path in inside:
        if path.is_symlink() and not path.resolve().is_relative_to(output):
            raise ValueError(
                f"run.output={given}: {path.relative_to(output)} is a link to {path.resolve()}, out of it; "
                "a run writes nothing elsewhere: remove the link, or choose a run.output that is on that disk"
            )


def write_config(cfg: DictConfig, output: Path, model_config: Any = None) -> None:
    """Writes the resolved configuration as `config.yaml`, and the model's whole transformers configuration."""
    output.mkdir(parents=True, exist_ok=True)
    partial = output / f"{CONFIG}.partial"
    OmegaConf.save(OmegaConf.create(redacted(OmegaConf.to_container(cfg))), partial)
    partial.replace(output / CONFIG)
    if model_config is not None:
        partial = output / f"{MODEL}.partial"
        partial.write_text(json.dumps(redacted(model_values(model_config)), indent=2, sort_keys=True) + "\n")
        partial.replace(output / MODEL)


def model_values(model_config: Any) -> dict[str, Any]:
    """What a transformers configuration says about the model, as JSON has it."""
    values = json.loads(model_config.to_json_string(use_diff=False))
    return {key: value for key, value in values.items() if key not in _OF_STORING and not key.startswith("_")}


def config_of(values: Mapping[str, Any]) -> Any:
    """The transformers configuration that `model_values` describes. Raises what transformers raises of values that it
    does not take."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**_with_floats(values))


def _with_floats(value: Any) -> Any:
    """A copy with the floats that JSON has not, such as infinity, for what transformers writes in their place."""
    if isinstance(value, Mapping):
        return (
            float(value[_FLOAT]) if set(value) == {_FLOAT} else {key: _with_floats(one) for key, one in value.items()}
        )
    return [_with_floats(one) for one in value] if isinstance(value, list) else value


def read_config(output: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """What `write_config` wrote: the configuration and the model's, None for one that is not there.

    Raises ValueError for a file that cannot be read.
    """
    path = output / CONFIG
    try:
        cfg: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else None
        path = output / MODEL
        model = json.loads(path.read_text()) if path.is_file() else None
    except Exception as error:  # of YAML, OmegaConf or JSON
        raise ValueError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}") from None
    for name, value in ((CONFIG, cfg), (MODEL, model)):
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{output / name} does not hold a configuration")
    return cfg, model
