"""Backends and plug-ins that are not there: the reference under other names, and packages that offer them."""

import importlib.metadata
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ringattn.kernels import registry
from ringattn.kernels.backends.reference import Reference
from ringattn.kernels.spec import Backend, Call, CallSpec, Capability, Grads, Options, SavedCall
from tests.caches import clear_caches

SPEC = CallSpec("cpu", torch.float32, 16, 16, 4, 2)
ORDER = ["fa4", "fa3", "fa2", "torch", "npu", "xpu", "cpu", "reference"]  # of `auto`
BUILTIN = [backend.name for backend in registry.builtin()]
# What a call may ask for beside its shape, by the names of capabilities.
FEATURES: dict[str, dict[str, Any]] = {
    "window": {"window": True},
    "softcap": {"softcap": 1.0},
    "dropout": {"dropout_p": 0.1},
    "unequal_head_dims": {"value_dim": 32},
}


class Fake(Reference):
    """The reference under another name, perhaps with a fault."""

    name = "npu2"
    capability = Capability(softcap=True, deterministic=True)
    launches = 0

    def fault(self, call: Call, options: Options) -> tuple[Call, Options]:
        return call, options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, options: Options, out: Tensor) -> Tensor:
        self.launches += 1
        return super().forward(q, k, v, *self.fault(call, options), out)

    def backward(self, dout: Tensor, saved: SavedCall, grads: Grads) -> None:
        call, options = self.fault(saved.call, saved.options)
        super().backward(dout, saved._replace(call=call, options=options), grads)


class Entry:
    def __init__(self, name: str, load: Callable[[], Callable[[], Backend]]) -> None:
        self.name, self.value, self.load = name, f"package:{name}", load


def plug(monkeypatch: pytest.MonkeyPatch, *entries: Entry) -> None:
    def entry_points(*, group: str) -> tuple[Entry, ...]:
        assert group == "ringattn.kernels"
        return entries

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    clear_caches()


def broken() -> Callable[[], Backend]:
    raise OSError("libascendcl.so is missing")
