"""What is computed once and kept with the object that it belongs to."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")

_NAME = "_kept"


def kept(owner: Any, key: Hashable, make: Callable[[], T]) -> T:
    """What `make` returns, called once for each key of `owner`, among whose attributes it lives and dies."""
    attributes = owner.__dict__  # of frozen records too
    try:
        return attributes[_NAME][key]  # the layers of a step ask hundreds of times: as fast as it can be
    except KeyError:
        pass  # and what `make` raises is not told as if it came of this
    value = attributes.setdefault(_NAME, {})[key] = make()
    return value


def keep(owner: Any, key: Hashable, value: Any) -> None:
    """Keeps what was made elsewhere, for `kept` to find."""
    owner.__dict__.setdefault(_NAME, {})[key] = value


def kept_keys(owner: Any) -> tuple[Hashable, ...]:
    """The keys by which something is kept, oldest first."""
    return tuple(owner.__dict__.get(_NAME, ()))


def without_kept(owner: Any) -> dict[str, Any]:
    """Its attributes but what is kept: the state of a copy, which makes that again where it is needed."""
    return {name: value for name, value in owner.__dict__.items() if name != _NAME}


def kept_already(owner: Any, key: Hashable) -> Any:
    """What is kept by a key, or None. For calls so frequent that making a function of what makes it would show."""
    found = owner.__dict__.get(_NAME)
    return None if found is None else found.get(key)
