"""What an installed kernel takes: asked of its signature or schema, never concluded from a version."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any


def parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Argument names of a Python function or of a torch operator."""
    schema = getattr(getattr(function, "default", None), "_schema", None)
    if schema is not None:
        return frozenset(argument.name for argument in schema.arguments)
    return frozenset(inspect.signature(function).parameters)


def require(function: Callable[..., Any] | None, name: str, needed: Iterable[str]) -> Callable[..., Any]:
    """`function`, or ImportError if it is missing or takes other arguments than those that are needed by keyword."""
    if function is None:
        raise ImportError(f"is installed but has another interface: {name} is missing")
    lacking = sorted(set(needed) - parameters(function))
    if lacking:
        raise ImportError(f"is installed but its {name} lacks {', '.join(lacking)}")
    return function


def why_missing(load: Callable[[], object]) -> str | None:
    """The message of the ImportError of a loader, or None."""
    try:
        load()
    except ImportError as error:
        return str(error)
    return None
