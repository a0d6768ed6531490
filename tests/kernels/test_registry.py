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
from ringattn.kernels.cpu import CpuFlash
from ringattn.kernels.reference import Reference
from ringattn.kernels.spec import Backend, Call, CallSpec, Capability, Grads, Options

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

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call, options: Options,
        grads: Grads,
    ) -> None:  # fmt: skip
        super().backward(dout, q, k, v, out, lse, *self.fault(call, options), grads)


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


def test_order() -> None:
    assert [name for name in BUILTIN if name in ORDER] == ORDER
    assert BUILTIN[-1] == "reference"


def test_plug_in_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    plug(monkeypatch, Entry("npu2", lambda: Fake))
    assert list(registry.backends()) == [*BUILTIN[:-1], "npu2", "reference"]
    assert isinstance(registry.choose(SPEC, "npu2"), Fake)
    monkeypatch.setattr(registry, "builtin", lambda: (CpuFlash(), Reference()))
    clear()
    assert registry.choose(SPEC).name == "cpu"
    assert registry.choose(replace(SPEC, softcap=1.0)).name == "npu2"  # the first that can, before the reference


def test_plug_in_that_fails_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    plug(monkeypatch, Entry("npu2", broken), Entry("npu3", lambda: Fake))
    with pytest.warns(UserWarning, match="package:npu2 cannot be loaded: OSError: libascendcl.so is missing"):
        assert list(registry.backends()) == [*BUILTIN[:-1], "npu3", "reference"]
    assert registry.choose(SPEC).name == "cpu"


@pytest.mark.parametrize("name", ["fa4", "reference"])
def test_plug_in_cannot_take_a_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    plug(monkeypatch, Entry(name, lambda: Fake))
    with pytest.warns(UserWarning, match=f"a backend '{name}' exists already; ignored"):
        assert list(registry.backends()) == BUILTIN
    assert not isinstance(registry.backends()[name], Fake)


def test_environment_chooses_and_the_argument_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.choose(SPEC).name == "cpu"
    monkeypatch.setenv("RINGATTN_BACKEND", "reference")
    assert registry.choose(SPEC).name == "reference"
    assert registry.choose(SPEC, "cpu").name == "cpu"
    monkeypatch.setenv("RINGATTN_BACKEND", "fa9")
    assert registry.choose(SPEC, "cpu").name == "cpu"
    with pytest.raises(ValueError, match=r"auto or one of fa4, fa3, .*cpu, .*reference, got 'fa9'"):
        registry.choose(SPEC)


def test_named_backend_that_cannot_is_refused_with_its_reason() -> None:
    with pytest.raises(NotImplementedError, match="'cpu' cannot do this call: it has no softcap"):
        registry.choose(replace(SPEC, softcap=1.0), "cpu")


@pytest.mark.parametrize(
    ("changes", "accepted", "reasons"),
    [
        ({}, {"cpu", "reference"}, {"fa4": "runs on cuda tensors only, got cpu", "npu": "npu tensors only"}),
        ({"softcap": 1.0}, {"reference"}, {"cpu": "has no softcap"}),
        ({"value_dim": 8}, {"reference"}, {"cpu": "has no unequal head dims, got 16 and 8"}),
        ({"device": "cuda"}, {"reference"}, {"fa2": "takes float16 and bfloat16, got torch.float32: cast the model"}),
        ({"device": "cuda", "dtype": torch.bfloat16, "head_dim": 36, "value_dim": 36}, None, {"fa3": "multiples of 8"}),
        ({"device": "cuda", "dtype": torch.bfloat16, "head_dim": 512, "value_dim": 512}, None, {"fa4": "up to 256"}),
        ({"device": "xpu", "dtype": torch.bfloat16, "window": True}, None, {"xpu": "has no window"}),
    ],
    ids=str,
)
def test_explain(changes: dict[str, Any], accepted: set[str] | None, reasons: dict[str, str]) -> None:
    table = registry.explain(replace(SPEC, **changes))
    assert list(table) == list(registry.backends())
    assert accepted is None or {name for name, reason in table.items() if reason is None} & set(ORDER) == accepted
    for name, reason in reasons.items():
        assert reason in (table[name] or "")


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


def test_deterministic_alone_only_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    """FEATURES row 14: what changes the mathematics is refused, this is told."""
    backend = registry.backends()["cpu"]
    monkeypatch.setattr(backend, "capability", replace(backend.capability, deterministic=False), raising=False)
    registry._chosen.cache_clear()
    with pytest.warns(UserWarning, match="cpu does not promise"):
        assert registry.choose(CallSpec("cpu", torch.float32, 8, 8, 4, 2, deterministic=True)).name == "cpu"
    registry._chosen.cache_clear()
