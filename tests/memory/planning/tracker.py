"""Bytes of live tensors, counted as PyTorch makes and drops them: a judge of what the planner states."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ringattn.kernels.registry import backends


class Tracker(TorchDispatchMode):
    """Counts the storages that operators return until they are gone. Not what is inside of an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self.alive: dict[int, tuple[Any, int, str]] = {}
        self.at_peak: list[tuple[int, str]] = []
        self.inside = False  # of an attention kernel

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.inside:
            return out
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                self._note(x, str(func))
        return out

    @contextmanager
    def kernels_as_operators(self) -> Iterator[None]:
        """Inside of it attention kernels are operators too: some on CPUs have tables of all pairs, which none on a GPU
        has."""
        with ExitStack() as stack:
            for backend in backends().values():
                for name in ("forward", "backward"):
                    stack.enter_context(patch.object(backend, name, self._operator(getattr(backend, name))))
            yield

    def _operator(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.inside = True
            try:
                out = kernel(*args)
            finally:
                self.inside = False
            if isinstance(out, torch.Tensor):
                self._note(out, "attention kernel")
            return out

        return call

    def _note(self, x: torch.Tensor, name: str) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive or not size:
            return
        self.alive[key] = weakref.ref(storage, lambda _: self._drop(key)), size, f"{name} {tuple(x.shape)} {x.dtype}"
        self.now += size
        if self.now > self.peak:
            self.peak = self.now
            self.at_peak = [(size, name) for _, size, name in self.alive.values()]

    def _drop(self, key: int) -> None:
        self.now -= self.alive.pop(key)[1]

    def begin_peak(self) -> None:
        """From now on the peak is a new one."""
        self.peak, self.at_peak = self.now, []

    def told(self) -> str:
        """What was alive at the peak, the largest first."""
        counted = Counter(self.at_peak)
        rows = sorted(counted.items(), key=lambda pair: -pair[0][0] * pair[1])
        return "\n".join(f"{count} x {size:>12,} {name}" for (size, name), count in rows)
