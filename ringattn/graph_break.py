"""Where a traced graph is broken off. A module of its own: its decorator imports the compiler, which takes seconds."""

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(reason="layouts and plans are made by the host, before a graph")
def on_host(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call that a graph is broken off for; see `ringattn.tracing`."""
    return function(*args, **kwargs)
