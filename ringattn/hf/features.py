"""Features of an attention layer: which ones a call asks for, and the call without one, to see that it counts."""

from dataclasses import replace
from typing import Any

from ringattn.mask import Mask

FEATURES = ("window", "chunk", "softcap", "sinks")


def features_of(options: dict[str, Any]) -> frozenset[str]:
    """Which of `FEATURES` the options of an attention call ask for."""
    mask: Mask = options["mask"]
    asked = {
        "window": mask.window != (-1, -1),
        "chunk": mask.chunk is not None,
        "softcap": bool(options["softcap"]),
        "sinks": options["sinks"] is not None,
    }
    return frozenset(name for name in FEATURES if asked[name])


def without_feature(options: dict[str, Any], feature: str) -> dict[str, Any]:
    """The options of an attention call without one of `FEATURES`."""
    mask: Mask = options["mask"]
    if feature == "window":
        return options | {"mask": replace(mask, window=(-1, -1))}
    if feature == "chunk":
        return options | {"mask": replace(mask, chunk=None)}
    return options | {feature: None}
