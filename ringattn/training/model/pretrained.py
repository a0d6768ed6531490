"""The weights of a saved model: all of them, or what the user names as different."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from ringattn.training.model.architecture import reason_of

_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_SHOWN = 8


def load_weights(config: Any, path: str, allow: Sequence[str] = (), shapes_only: bool = False) -> tuple[nn.Module, str]:
    """The model saved at `path` in float32 on the CPU, and what of its weights differs as `allow` permits ("" if none).

    Arguments:
        config: its configuration, with changes.
        allow: patterns of weights, as in `lm_head.*`, that may be missing (they are then drawn at random), of another
            shape (the same) or unexpected (then left out).
        shapes_only: on the meta device; reads the names and shapes of the weights only.

    Raises ValueError listing every other weight that is missing, unexpected or misshapen, and for files that cannot be
    read, naming them.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(path).expanduser()
    _check_files(folder, path)
    try:
        with _own_report(bar=not shapes_only and sys.stderr.isatty()):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                device_map="meta" if shapes_only else None,
            )
    except Exception as error:
        raise ValueError(f"model.path={path!r}: the weights cannot be read: {reason_of(error)}") from None
    model, info = loaded
    return model, _differences(info, path, allow)


@contextmanager
def _own_report(bar: bool) -> Iterator[None]:
    """What differs is told here, and not by a table of transformers on every rank; its progress bar only with `bar`."""
    from transformers.utils import logging

    verbosity, enabled = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bar:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if enabled:
            logging.enable_progress_bar()


def _check_files(folder: Path, path: str) -> None:
    """Raises ValueError, with the file's name, for files of weights that are not there or not whole."""
    from safetensors import SafetensorError, safe_open

    for name in _weight_files(folder, path):
        file = folder / name
        if not file.is_file():
            raise ValueError(f"model.path={path!r}: {name} is not there, and its index names it")
        with open(file, "rb") as opened:
            if opened.read(64).startswith(b"version https://git-lfs"):
                raise ValueError(f"model.path={path!r}: {name} is a Git LFS pointer; fetch the weights: git lfs pull")
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
            else:
                torch.load(file, map_location="meta", weights_only=True)
        except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
            raise ValueError(f"model.path={path!r}: {name} is incomplete or damaged: {reason_of(error)}") from None


def _weight_files(folder: Path, path: str) -> list[str]:
    """The names of the files that transformers will read."""
    found = next((name for name in _FILES if (folder / name).is_file()), None)
    if found is None:
        raise ValueError(f"model.path={path!r} holds no weights: none of {', '.join(_FILES)}")
    if not found.endswith(".json"):
        return [found]
    try:
        return sorted(set(json.loads((folder / found).read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"model.path={path!r}: {found} cannot be read: {reason_of(error)}") from None


def _differences(info: Mapping[str, Any], path: str, allow: Sequence[str]) -> str:
    kinds = {
        "missing": {name: name for name in info["missing_keys"]},
        "unexpected": {name: name for name in info["unexpected_keys"]},
        "of another shape": {
            name: f"{name} ({list(saved)} in the file, {list(wanted)} in the model)"
            for name, saved, wanted in info["mismatched_keys"]
        },
    }
    allowed, refused = [], []
    for kind, found in kinds.items():
        permitted = {name for name in found if any(fnmatchcase(name, pattern) for pattern in allow)}
        allowed += _told(kind, [text for name, text in found.items() if name in permitted])
        refused += _told(kind, [text for name, text in found.items() if name not in permitted])
    if refused or info.get("error_msgs"):
        more = [str(message) for message in info.get("error_msgs", ())]
        raise ValueError(
            f"model.path={path!r}: its weights are not those of the model: {'; '.join(refused + more)}. If that is "
            "what you want, name them in model.allow_mismatch: missing ones are drawn at random, unexpected ones left "
            "out"
        )
    names = {name for found in kinds.values() for name in found}
    if unused := [pattern for pattern in allow if not any(fnmatchcase(name, pattern) for name in names)]:
        raise ValueError(f"model.allow_mismatch: no weight that differs matches {', '.join(map(repr, unused))}")
    return "; ".join(allowed)


def _told(kind: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    shown = sorted(names)[:_SHOWN]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return [f"{len(names)} {kind}: {', '.join(shown)}{more}"]
