"""Which backend is chosen, for what reason, and from whom."""

import logging
import socket
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from ringattn import Documents, Layout, MeshShape, parallel_attention
from ringattn.kernels import registry, selftest
from ringattn.kernels.backends.cpu import CpuFlash
from ringattn.kernels.backends.reference import Reference
from ringattn.kernels.spec import Backend, CallSpec
from tests.kernels.fake_backends import BUILTIN, FEATURES, ORDER, SPEC


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch: pytest.MonkeyPatch, fresh_caches: None) -> None:
    """The environment names no backend."""
    monkeypatch.delenv("RINGATTN_BACKEND", raising=False)


def test_backends_are_asked_in_this_order_and_the_reference_last() -> None:
    assert [name for name in BUILTIN if name in ORDER] == ORDER
    assert BUILTIN[-1] == "reference"


def test_no_two_backends_share_a_place() -> None:
    assert len(set(BUILTIN)) == len(BUILTIN) == len(registry.builtin())


@pytest.mark.parametrize(
    ("changes", "accepted", "reasons"),
    [
        ({}, ("cpu", "reference"), {"fa4": "runs on cuda tensors only, got cpu", "npu": "npu tensors only"}),
        ({"softcap": 1.0}, ("reference",), {"cpu": "has no softcap"}),
        ({"value_dim": 8}, ("reference",), {"cpu": "has no unequal head dims, got 16 and 8"}),
        ({"device": "cuda"}, ("reference",), {"fa2": "takes float16 and bfloat16, got torch.float32: cast the model"}),
        ({"device": "cuda", "dtype": torch.bfloat16, "head_dim": 36, "value_dim": 36}, None, {"fa3": "multiples of 8"}),
        ({"device": "cuda", "dtype": torch.bfloat16, "head_dim": 512, "value_dim": 512}, None, {"fa4": "up to 256"}),
        ({"device": "xpu", "dtype": torch.bfloat16, "window": True}, None, {"xpu": "has no window"}),
    ],
    ids=str,
)
def test_every_backend_is_explained(
    changes: dict[str, Any], accepted: tuple[str, ...] | None, reasons: dict[str, str]
) -> None:
    table = registry.explain(replace(SPEC, **changes))
    assert list(table) == list(registry.backends())
    found = {name for name, reason in table.items() if reason is None} & set(ORDER)
    assert accepted is None or found == set(accepted)
    for name, reason in reasons.items():
        assert reason in (table[name] or "")


def test_auto_takes_the_first_that_has_the_features() -> None:
    """The second of two that could is not asked."""
    assert registry.choose(SPEC).name == "cpu"
    assert registry.choose(replace(SPEC, window=True)).name == "cpu"
    for changes in FEATURES.values():
        if not changes.get("window"):
            assert registry.choose(replace(SPEC, **changes)).name == "reference"


def test_the_fallback_on_gpus_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And on CPUs, where nobody expects a kernel, not at all."""
    monkeypatch.setattr(registry, "builtin", lambda: (CpuFlash(), Reference()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for layer in range(3):
            assert registry.choose(replace(SPEC, softcap=1.0)).name == "reference"
            assert registry.choose(CallSpec("cuda", torch.bfloat16, 64 + layer, 64 + layer, 4, 2)).name == "reference"
    (warning,) = caught
    assert "falling back to plain torch: cpu runs on cpu tensors only, got cuda" in str(warning.message)


def test_a_layer_with_larger_heads_gets_a_backend_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 4 has head dims 256 and 512: each layer asks for itself, and the kernels' limits are named."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(selftest, "failure", lambda backend, spec: None)
    for name, backend in registry.backends().items():
        installed = None if name in ("torch", "reference") else "is not installed"
        monkeypatch.setattr(backend, "missing", lambda installed=installed: installed)
    small, large = (CallSpec("cuda", torch.bfloat16, dim, dim, 8, 4) for dim in (256, 512))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert registry.choose(small).name == "torch"
            assert registry.choose(large).name == "reference"
    (warning,) = caught
    assert "torch takes head dims up to 256, got 512" in str(warning.message)


def test_named_backend_that_cannot_is_refused_with_its_reason() -> None:
    with pytest.raises(NotImplementedError, match="'cpu' cannot do this call: it has no softcap"):
        registry.choose(replace(SPEC, softcap=1.0), "cpu")


LACKING = [
    pytest.param(backend, feature, id=f"{backend.name}-{feature}")
    for backend in registry.builtin()
    for feature in FEATURES
    if not getattr(backend.capability, feature)
]


@pytest.mark.parametrize(("backend", "feature"), LACKING)
def test_a_feature_that_a_backend_lacks_is_refused_by_name(
    gpu_of: Callable[[int, int], None], backend: Backend, feature: str
) -> None:
    """Whether it is installed or not. What backends that are present do is compared by the conformance suite."""
    declared = backend.capability
    if declared.compute_capability is not None:
        gpu_of(*declared.compute_capability[0])
    spec = CallSpec((declared.devices or ("cpu",))[0], (declared.dtypes or (torch.bfloat16,))[0], 64, 64, 4, 2)
    words = feature.replace("_", " ")
    with pytest.raises(NotImplementedError, match=f"backend '{backend.name}' cannot do this call: it has .*{words}"):
        registry.choose(replace(spec, **FEATURES[feature]), backend.name)


def test_softcap_on_torchs_kernel_is_refused(gpu_of: Callable[[int, int], None]) -> None:
    """A call is refused for what it asks, whatever the model is called."""
    gpu_of(9, 0)
    spec = CallSpec("cuda", torch.bfloat16, 256, 256, 8, 4, softcap=50.0)
    with pytest.raises(NotImplementedError, match="backend 'torch' cannot do this call: it has no softcap"):
        registry.choose(spec, "torch")


@pytest.mark.parametrize("name", ["fa4", "fa3", "fa2", "torch"])
def test_fp32_on_a_half_precision_kernel_is_refused_with_a_hint(name: str) -> None:
    with pytest.raises(NotImplementedError, match=r"got torch.float32: cast the model or use autocast"):
        registry.choose(CallSpec("cuda", torch.float32, 64, 64, 4, 2), name)
    assert registry.choose(CallSpec("cuda", torch.float32, 64, 64, 4, 2), "reference").name == "reference"


def test_a_backend_that_is_not_deterministic_is_taken_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """What changes the mathematics is refused, this is told."""
    backend = registry.backends()["cpu"]
    monkeypatch.setattr(backend, "capability", replace(backend.capability, deterministic=False), raising=False)
    with pytest.warns(UserWarning, match="cpu does not promise"):
        assert registry.choose(CallSpec("cpu", torch.float32, 8, 8, 4, 2, deterministic=True)).name == "cpu"


def test_the_argument_wins_over_the_environment_over_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.choose(SPEC).name == "cpu"
    monkeypatch.setenv("RINGATTN_BACKEND", "reference")
    assert registry.choose(SPEC).name == "reference"
    assert registry.choose(SPEC, "cpu").name == "cpu"
    monkeypatch.setenv("RINGATTN_BACKEND", "fa9")
    assert registry.choose(SPEC, "cpu").name == "cpu"
    with pytest.raises(ValueError, match=r"auto or one of fa4, fa3, .*cpu, .*reference, got 'fa9'"):
        registry.choose(SPEC)


def test_a_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ringattn"):
        for _ in range(3):
            registry.choose(SPEC)
            registry.choose(SPEC, "reference")
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("backend ")]
    assert [text.partition(":")[0] for text in told] == [
        "backend cpu, asked for auto",
        "backend reference, asked for reference",
    ]


def test_no_connection_is_opened_to_choose_or_to_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every backend is asked and one computes, with no way out of this machine."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a connection was asked for")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert set(registry.explain(SPEC)) == set(registry.backends())
    q, k, v = (torch.randn(6, heads, 8) for heads in (4, 2, 2))
    assert parallel_attention(q, k, v, Layout(Documents([6]), MeshShape())).isfinite().all()
