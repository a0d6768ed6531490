"""Which backend is chosen, and which is trusted."""

import importlib.metadata
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ringattn.kernels import registry, selftest
from ringattn.kernels.backends.reference import Reference
from ringattn.kernels.spec import Backend, Call, CallSpec, Capability, Grads, Options, SavedCall

SPEC = CallSpec("cpu", torch.float32, 16, 16, 4, 2)
ORDER = ["fa4", "fa3", "fa2", "torch", "npu", "xpu", "cpu", "reference"]
BUILTIN = [backend.name for backend in registry.builtin()]


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


class WrongKeys(Fake):
    def backward(self, *args: Any) -> None:
        super().backward(*args)
        args[-1].dk.mul_(1.1)


class NoWindow(Fake):
    def fault(self, call: Call, options: Options) -> tuple[Call, Options]:
        return replace(call, left=-1, right=0 if call.right == 0 else -1), options


class NoSoftcap(Fake):
    def fault(self, call: Call, options: Options) -> tuple[Call, Options]:
        return call, replace(options, softcap=0.0)


class Raises(Fake):
    def forward(self, *args: Any) -> Tensor:
        raise RuntimeError("no kernel image")


class NaN(Fake):
    def forward(self, *args: Any) -> Tensor:
        return super().forward(*args) * float("nan")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing that a test found out is left to the next."""
    clear()
    yield
    clear()


def clear() -> None:
    registry.backends.cache_clear()
    registry._chosen.cache_clear()
    selftest.forget()


class Entry:
    def __init__(self, name: str, load: Callable[[], Callable[[], Backend]]) -> None:
        self.name, self.value, self.load = name, f"package:{name}", load


def plug(monkeypatch: pytest.MonkeyPatch, *entries: Entry) -> None:
    def entry_points(*, group: str) -> tuple[Entry, ...]:
        assert group == "ringattn.kernels"
        return entries

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    clear()


def broken() -> Callable[[], Backend]:
    raise OSError("libascendcl.so is missing")


def test_named_backend_that_cannot_is_refused_with_its_reason() -> None:
    with pytest.raises(NotImplementedError, match="'cpu' cannot do this call: it has no softcap"):
        registry.choose(replace(SPEC, softcap=1.0), "cpu")


@pytest.mark.parametrize("changes", [{}, {"window": True}, {"softcap": 2.0}], ids=str)
def test_selftest_accepts_a_right_backend(changes: dict[str, Any]) -> None:
    assert selftest.failure(Fake(), replace(SPEC, **changes)) is None


@pytest.mark.parametrize(
    ("backend", "changes", "reason"),
    [
        (WrongKeys(), {}, r"is wrong at head dims 16/16 \(relative error of dk 0.1\)"),
        (NoWindow(), {"window": True}, "is wrong at head dims 16/16 .*out .*dq"),
        (NoSoftcap(), {"softcap": 2.0}, "is wrong at head dims 16/16 .*out .*dq"),
        (Raises(), {}, "failed its self-test: RuntimeError: no kernel image"),
        (NaN(), {}, "lse nan"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_selftest_rejects(monkeypatch: pytest.MonkeyPatch, backend: Fake, changes: dict[str, Any], reason: str) -> None:
    spec = replace(SPEC, **changes)
    assert selftest.failure(backend, spec) is not None
    plug(monkeypatch, Entry("npu2", lambda: lambda: backend))
    with pytest.raises(NotImplementedError, match=reason):
        registry.choose(spec, "npu2")
    assert registry.choose(spec).name != "npu2"


def test_a_feature_that_is_not_asked_for_is_not_held_against_a_backend() -> None:
    assert selftest.failure(NoWindow(), SPEC) is None
    assert selftest.failure(NoSoftcap(), SPEC) is None


def test_results_are_kept_per_signature_and_forgotten() -> None:
    backend = Fake()
    selftest.failure(backend, SPEC)
    once = backend.launches
    assert once > 0
    selftest.failure(backend, replace(SPEC, query_heads=8, key_heads=4))  # the same group of query heads
    assert backend.launches == once
    selftest.failure(backend, replace(SPEC, head_dim=32, value_dim=32))
    assert backend.launches == 2 * once
    selftest.forget()
    selftest.failure(backend, SPEC)
    assert backend.launches == 3 * once


def test_selftest_leaves_the_random_state() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selftest.failure(Fake(), SPEC)
    assert torch.equal(torch.rand(1), expected)
