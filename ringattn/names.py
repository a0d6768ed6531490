"""Other names for the arguments of the public functions, accepted once, at the edge.

The names are those of FlashAttention (`window_size`, `learnable_sink`), transformers (`sliding_window`, `scaling`,
`s_aux`, `attn_logit_softcapping`), torch (`scale`) and ejkernel (`softmax_aux`, `logits_soft_cap`).
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from ringattn.mask import Mask

# Canonical name -> its other names, with the same values.
ALIASES = {
    "softmax_scale": ("scale", "scaling", "sm_scale"),
    "softcap": ("logits_soft_cap", "attn_logit_softcapping"),
    "dropout_p": ("dropout",),
    "sinks": ("s_aux", "learnable_sink", "softmax_aux"),
}
# Names that together make a `Mask`, and the part of it that each gives.
MASK_PARTS = {"causal": "causal", "window": "window", "window_size": "window", "sliding_window": "window"}

P = ParamSpec("P")
R = TypeVar("R")


def canonical(kwargs: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The same arguments under the names that a function takes.

    `window` and `window_size` are (left, right) of `Mask`; `sliding_window=W` is the causal (W - 1, 0), None is off;
    `causal` is that of `Mask`. They make the `mask`, so they are for calls that give none.

    Arguments:
        kwargs: keyword arguments of a call.
        names: what the function takes.

    Raises TypeError if an argument comes under two names (both are told), or a name is unknown (with the closest one).
    """
    if all(name in names for name in kwargs):
        return dict(kwargs)
    to_canonical = {alias: name for name, aliases in ALIASES.items() for alias in aliases if name in names}
    parts = {name: part for name, part in MASK_PARTS.items() if "mask" in names}
    known = {*names, *to_canonical, *parts}
    for name in kwargs:
        if name not in known:
            raise TypeError(f"unknown argument {name!r}{_closest(name, known)}")
    renamed: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, value in kwargs.items():
        if name in parts and name not in names:
            continue
        target = to_canonical.get(name, name)
        if target in renamed:
            raise TypeError(f"{origin[target]!r} and {name!r} are the same argument: give one")
        renamed[target], origin[target] = value, name
    given = {name: kwargs[name] for name in parts if name in kwargs and name not in names}
    if given:
        if renamed.get("mask") is not None:
            raise TypeError(f"'mask' and {next(iter(given))!r} both say who attends to whom: give one")
        renamed["mask"] = _mask(given)
    return renamed


def accept_aliases(function: Callable[P, R]) -> Callable[P, R]:
    """A function that also takes the other names of its arguments; its signature shows the canonical ones only."""
    names = frozenset(inspect.signature(function).parameters)

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if names.issuperset(kwargs):
            return function(*args, **kwargs)
        return function(*args, **canonical(kwargs, names))

    return wrapper


def _mask(given: Mapping[str, Any]) -> Mask:
    windows = [name for name in given if MASK_PARTS[name] == "window"]
    if len(windows) > 1:
        raise TypeError(f"{windows[0]!r} and {windows[1]!r} are the same argument: give one")
    causal = given.get("causal", True)
    if not windows:
        return Mask(causal=causal)
    value = given[windows[0]]
    if windows[0] == "sliding_window":
        if causal is False and value is not None:
            raise TypeError("'sliding_window' is causal, 'causal' is False: give window=(left, right)")
        value = _sliding(value)
    return Mask(causal=causal, window=value)


def _sliding(tokens: int | None) -> tuple[int, int]:
    if tokens is None:
        return -1, -1
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f"sliding_window must be None or a number of tokens >= 1, itself included, got {tokens!r}")
    return tokens - 1, 0


def _closest(name: str, known: Collection[str]) -> str:
    matches = get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else f"; known are {', '.join(sorted(known))}"
