"""What `torch.compile` must not trace: plans are the host's integers, made anew for every batch.

Traced, they would be a graph for each batch, and NumPy's numbers would be computed by torch, which rounds otherwise:
ranks that trace different parts of it would disagree about who holds which tokens.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, for which a graph is broken off where one is traced; under fullgraph=True that is an error."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        from ringattn.graph_break import on_host  # imports the compiler

        return on_host(function, *args, **kwargs)

    return call
