"""Bytes of tensors on the meta device, counted as PyTorch makes and drops them: nothing is computed."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HeldStorages(TorchDispatchMode):
    """Counts what operators return inside of it until it is gone; a view of what was there before is nothing new.

    Attributes:
        now, most: bytes that are there, and the most that have been.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self._products: set[int] = set()
        self._sizes: dict[int, tuple[int, object]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        product = str(func).startswith(("aten.mm", "aten.addmm"))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                self._note(x, product)
        return out

    def size_of(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of the storages of some tensors that it has counted, each once."""
        return sum(self._sizes[key][0] for key in self._keys(tensors))

    def products_without(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of what is there of matrix products, but for the storages of some tensors."""
        return sum(self._sizes[key][0] for key in self._products - self._keys(tensors))

    def begin_most(self) -> None:
        """From now on the most is counted anew."""
        self.most = self.now

    def _keys(self, tensors: Iterable[Tensor]) -> set[int]:
        return {x.untyped_storage()._cdata for x in tensors} & self._sizes.keys()

    def _note(self, x: Tensor, product: bool) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes:
            return
        self._sizes[key] = size, weakref.ref(storage, lambda _: self._drop(key))
        if product:
            self._products.add(key)
        self.now += size
        self.most = max(self.most, self.now)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)[0]
        self._products.discard(key)


@contextmanager
def kept_tensors() -> Iterator[list[Tensor]]:
    """The tensors that autograd keeps inside of it."""
    kept: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        yield kept


def state_in(module: torch.nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters and buffers like those of a module, on the meta device; those of floating point are of one dtype."""
    return {name: _like(x, dtype) for name, x in (*module.named_parameters(), *module.named_buffers())}


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    if not x.is_floating_point():
        return torch.empty_like(x, device="meta")
    return torch.empty_like(x, device="meta", dtype=dtype, requires_grad=True)
