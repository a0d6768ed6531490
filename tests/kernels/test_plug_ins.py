"""Backends of other packages: taken where they keep the contract, told about and left out where not."""

from dataclasses import replace
from typing import Any

import pytest

from ringattn import parallel_attention
from ringattn.kernels import registry
from ringattn.kernels.backends.cpu import CpuFlash
from ringattn.kernels.backends.reference import Reference
from ringattn.kernels.spec import Capability
from tests.caches import clear_caches
from tests.kernels.fake_backends import BUILTIN, SPEC, Entry, Fake, broken, plug
from tests.small_tensors import LAYOUT, tensors


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch: pytest.MonkeyPatch, fresh_caches: None) -> None:
    """The environment names no backend."""
    monkeypatch.delenv("RINGATTN_BACKEND", raising=False)


def test_a_plug_in_stands_before_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    plug(monkeypatch, Entry("npu2", lambda: Fake))
    assert list(registry.backends()) == [*BUILTIN[:-1], "npu2", "reference"]
    assert isinstance(registry.choose(SPEC, "npu2"), Fake)
    monkeypatch.setattr(registry, "builtin", lambda: (CpuFlash(), Reference()))
    clear_caches()
    assert registry.choose(SPEC).name == "cpu"
    assert registry.choose(replace(SPEC, softcap=1.0)).name == "npu2"  # the first that can, before the reference


def test_a_plug_in_that_fails_to_load_is_told_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    plug(monkeypatch, Entry("npu2", broken), Entry("npu3", lambda: Fake))
    with pytest.warns(UserWarning, match="package:npu2 cannot be loaded: OSError: libascendcl.so is missing"):
        assert list(registry.backends()) == [*BUILTIN[:-1], "npu3", "reference"]
    assert registry.choose(SPEC).name == "cpu"


@pytest.mark.parametrize("name", ["fa4", "reference"])
def test_a_plug_in_cannot_take_the_name_of_a_backend(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    plug(monkeypatch, Entry(name, lambda: Fake))
    with pytest.warns(UserWarning, match=f"a backend '{name}' exists already; ignored"):
        assert list(registry.backends()) == BUILTIN
    assert not isinstance(registry.backends()[name], Fake)


class NoBackward:
    """Cannot train."""

    name = "npu2"
    capability = Capability()
    missing = Fake.missing
    forward = Fake.forward


class OldBackward(Fake):
    """Written for the contract that had an argument for each tensor."""

    def backward(self, dout, q, k, v, out, lse, call, options, grads) -> None:  # type: ignore[no-untyped-def, override]
        raise AssertionError


class Undeclared(Fake):
    capability = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("candidate", "told"),
    [
        (NoBackward, "has no backward"),
        (
            OldBackward,
            r"cannot be called as backward\(dout, saved, grads\), the contract of ringattn.kernels.spec.Backend: "
            r"its own is backward\(dout, q, k, v, out, lse, call, options, grads\)",
        ),
        (Undeclared, "has no capability"),
    ],
)
def test_a_plug_in_that_is_no_backend_is_ignored(monkeypatch: pytest.MonkeyPatch, candidate: Any, told: str) -> None:
    plug(monkeypatch, Entry("npu2", lambda: candidate))
    with pytest.warns(UserWarning, match=f"backend 'npu2': entry point package:npu2 is no backend: it {told}"):
        assert list(registry.backends()) == BUILTIN
    assert registry.choose(SPEC).name == "cpu"
    with pytest.raises(ValueError, match=f"got 'npu2'; entry point package:npu2 is no backend: it {told}"):
        parallel_attention(*tensors(), LAYOUT, backend="npu2")
