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


def kept_already(owner: Any, key: Hashable) -> Any:
    """What is kept by a key, or None. For calls so frequent that making a function of what makes it would show."""
    found = owner.__dict__.get(_NAME)
    return None if found is None else found.get(key)
