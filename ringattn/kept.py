"""What is computed once and kept with the object that it belongs to."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")

_NAME = "_kept"
_NONE = object()


def kept(owner: Any, key: Hashable, make: Callable[[], T]) -> T:
    """What `make` returns, called once for each key of `owner`, among whose attributes it lives and dies."""
    found = owner.__dict__.setdefault(_NAME, {})
    value = found.get(key, _NONE)
    if value is _NONE:
        value = found[key] = make()
    return value


def kept_already(owner: Any, key: Hashable) -> Any:
    """What is kept by a key, or None. For calls so frequent that making a function of what makes it would show."""
    return owner.__dict__.setdefault(_NAME, {}).get(key)
