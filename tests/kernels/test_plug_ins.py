"""Backends of other packages: taken where they keep the contract, told about and left out where not."""

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from ringattn.kernels import registry
from ringattn.kernels.backends.cpu import CpuFlash
from ringattn.kernels.backends.reference import Reference
from ringattn.kernels.spec import Capability
from tests.caches import clear_caches
from tests.kernels.fake_backends import BUILTIN, SPEC, Entry, Fake, broken, plug


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
    """Written for another contract."""

    def backward(self, dout: Tensor, q: Tensor) -> None:  # type: ignore[override]
        raise AssertionError


class Undeclared(Fake):
    capability = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("candidate", "told"),
    [
        (NoBackward, "has no backward"),
        (OldBackward, r"cannot be called as backward\(dout, q, k, v, out, lse, "),
        (Undeclared, "has no capability"),
    ],
)
def test_a_plug_in_that_is_no_backend_is_ignored(monkeypatch: pytest.MonkeyPatch, candidate: Any, told: str) -> None:
    plug(monkeypatch, Entry("npu2", lambda: candidate))
    with pytest.warns(UserWarning, match=f"package:npu2 is no backend: it {told}"):
        assert list(registry.backends()) == BUILTIN
