"""Which keys of a configuration shape the loss curve: those that two starts in one folder must agree on."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ringattn.training.config import memory_keys as memory
from ringattn.training.config import optim
from ringattn.training.config.checks import flat

# What may differ between two starts in the same folder without changing the curve, beside `parallel` and most of `run`.
# Files, sources and tokenizer count by their contents, which the corpus' fingerprint holds, and learning rates as
# optim.lr.
SAME_CURVE = {"data.prefetch", "data.ahead", "data.cache", "data.files", "data.tokenizer"}
SAME_CURVE |= {
    "data.share_prefixes",
    "data.sources",
    "data.on_error",
    "data.chat_template",
    "data.processes",
    "data.validation",
}
SAME_CURVE |= {"engine.compile", "model.name", "model.lr", "model.lr_from_path", "model.allow_mismatch"}
# What keys were before they were there.
BEFORE: dict[str, Any] = memory.BEFORE | optim.BEFORE | {"model.freeze": [], "data.packing": "order"}
CURVE_OF_RUN = ("run.seed", "run.steps", "run.dtype")


def curve_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Keys whose values would change the loss curve: (key, old value, new value). Absent and null are the same."""
    before, after = BEFORE | flat(old), BEFORE | flat(new)
    missing = "(absent)"
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return [(key, before.get(key, missing), after.get(key, missing)) for key in keys if _shapes_curve(key)]


def curve_digest(values: Mapping[str, Any]) -> str:
    """A short hash of the keys of a resolved configuration that shape the loss curve: the same for two between which
    `curve_differences` finds none."""
    shaping = {key: value for key, value in (BEFORE | flat(values)).items() if value is not None and _shapes_curve(key)}
    return hashlib.sha256(json.dumps(shaping, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _shapes_curve(key: str) -> bool:
    group = key.split(".")[0]
    if group == "run":
        return key in CURVE_OF_RUN
    if group == "memory":
        return key in memory.SHAPE_CURVE
    return group != "parallel" and key not in SAME_CURVE and not key.startswith("data.validation.")
