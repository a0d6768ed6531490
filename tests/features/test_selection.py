"""FEATURES A.1: which backend does a call, and what is found out about it before."""

import json
import socket
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ringattn import Documents, Layout, MeshShape, parallel_attention
from ringattn.cli import main
from ringattn.commands import doctor
from ringattn.kernels import registry, selftest
from ringattn.kernels.backends import fa2, fa4, flex
from ringattn.kernels.backends.cpu import CpuFlash
from ringattn.kernels.backends.fa4 import FlashAttention4
from ringattn.kernels.backends.flex import FlexAttention
from ringattn.kernels.backends.npu import NpuFusion
from ringattn.kernels.backends.reference import Reference
from ringattn.kernels.backends.xpu import XpuFlash
from ringattn.kernels.spec import Backend, Block, Call, CallSpec, Capability, Options
from tests.kernels.backends.test_conformance import present
from tests.kernels.test_probing import both_modules, empty_site, install
from tests.kernels.test_registry import BUILTIN, ORDER, SPEC, Entry, Fake, broken, clear, plug
from tests.test_import import LOOK, loaded

site = pytest.fixture(empty_site)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing that a test found out is left to the next."""
    monkeypatch.delenv("RINGATTN_BACKEND", raising=False)
    clear()
    yield
    clear()


@pytest.fixture
def gpu_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`gpu_of(9, 0)`: from now on the only device has this compute capability."""

    def pretend(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return pretend


def test_row_01_import_loads_no_optional_package() -> None:
    """Whatever torch itself loads is not ours to forbid (a CUDA build may load triton)."""
    statement = LOOK.replace("import sys, ringattn;", "import sys, ringattn.kernels.registry;")
    ours = loaded(statement) - loaded(statement.replace("ringattn.kernels.registry", "torch"))
    assert "ringattn" in ours
    forbidden = {"flash_attn", "flash_attn_interface", "transformers", "deepspeed", "hydra", "omegaconf", "triton"}
    assert not ours & (forbidden | {"matplotlib", "tensorboard", "tqdm", "xformers", "torch_npu"})


def test_row_01_a_failed_load_is_tried_again(monkeypatch: pytest.MonkeyPatch, site: Path) -> None:
    for distribution in ("flash-attn", "flash-attn-4"):
        install(site, distribution)
    for backend in (fa2.FlashAttention2(), fa4.FlashAttention4()):
        assert "is installed but cannot be imported: ModuleNotFoundError" in (backend.missing() or "")
    both_modules(monkeypatch)
    for backend in (fa2.FlashAttention2(), fa4.FlashAttention4()):
        assert backend.missing() is None


def test_row_02_the_order() -> None:
    assert [name for name in BUILTIN if name in ORDER] == ORDER
    assert BUILTIN[-1] == "reference"


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
def test_row_02_every_backend_is_explained(
    changes: dict[str, Any], accepted: set[str] | None, reasons: dict[str, str]
) -> None:
    table = registry.explain(replace(SPEC, **changes))
    assert list(table) == list(registry.backends())
    assert accepted is None or {name for name, reason in table.items() if reason is None} & set(ORDER) == accepted
    for name, reason in reasons.items():
        assert reason in (table[name] or "")


FEATURES: dict[str, dict[str, Any]] = {
    "window": {"window": True},
    "softcap": {"softcap": 1.0},
    "dropout": {"dropout_p": 0.1},
    "unequal_head_dims": {"value_dim": 32},
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("backend", registry.builtin(), ids=lambda backend: backend.name)
def test_row_02_a_backend_takes_the_features_that_it_declares(gpu_of: Any, backend: Backend, feature: str) -> None:
    """The whole matrix, also of backends that are not installed; what is refused is named."""
    declared = backend.capability
    if declared.compute_capability is not None:
        gpu_of(*declared.compute_capability[0])
    plain = CallSpec((declared.devices or ("cpu",))[0], (declared.dtypes or (torch.bfloat16,))[0], 64, 64, 4, 2)
    assert declared.refusal(plain) is None
    reason = declared.refusal(replace(plain, **FEATURES[feature]))
    assert (reason is None) == getattr(declared, feature)
    assert reason is None or feature.replace("_", " ") in reason


def test_row_02_auto_takes_the_first_that_has_the_features() -> None:
    """The second of two that could is not asked."""
    assert registry.choose(SPEC).name == "cpu"
    assert registry.choose(replace(SPEC, window=True)).name == "cpu"
    for changes in FEATURES.values():
        if not changes.get("window"):
            assert registry.choose(replace(SPEC, **changes)).name == "reference"


@pytest.mark.parametrize(
    ("distribution", "found", "other"),
    [("flash-attn-4", fa4.FlashAttention4(), fa2.FlashAttention2()), ("flash-attn", fa2.FlashAttention2(), None)],
)
def test_row_03_the_distribution_decides(
    monkeypatch: pytest.MonkeyPatch, site: Path, distribution: str, found: Backend, other: Backend | None
) -> None:
    both_modules(monkeypatch)
    other = other or fa4.FlashAttention4()
    assert "is not installed: pip install" in (found.missing() or "")
    install(site, distribution)
    assert found.missing() is None
    assert "is not installed: pip install" in (other.missing() or "")


def test_row_03_the_signature_decides_too(monkeypatch: pytest.MonkeyPatch, site: Path) -> None:
    for distribution in ("flash-attn", "flash-attn-4"):
        install(site, distribution)
    both_modules(monkeypatch)
    monkeypatch.setattr("flash_attn.flash_attn_interface._flash_attn_varlen_forward", lambda q, k, v, window_size: None)
    reason = fa2.FlashAttention2().missing() or ""
    assert "is installed but its _flash_attn_varlen_forward lacks" in reason
    assert "window_size_left" in reason
    monkeypatch.delattr("flash_attn.cute.interface._flash_attn_bwd")
    assert "_flash_attn_bwd is missing" in (fa4.FlashAttention4().missing() or "")


@pytest.mark.parametrize(
    ("name", "capability", "accepted"),
    [
        ("fa4", (8, 9), False), ("fa4", (9, 0), True), ("fa4", (10, 0), True),
        ("fa3", (8, 0), False), ("fa3", (9, 0), True), ("fa3", (10, 0), False),
        ("fa2", (7, 5), False), ("fa2", (8, 0), True), ("fa2", (12, 0), True),
        ("torch", (7, 5), False), ("torch", (8, 6), True), ("flex", (7, 5), False), ("flex", (8, 0), True),
    ],
)  # fmt: skip
def test_row_04_compute_capabilities(gpu_of: Any, name: str, capability: tuple[int, int], accepted: bool) -> None:
    gpu_of(*capability)
    reason = registry.backends()[name].capability.refusal(CallSpec("cuda", torch.bfloat16, 64, 64, 4, 2))
    assert (reason is None) == accepted
    if reason is not None:
        found = ".".join(map(str, capability))
        assert reason.startswith("needs compute capability ")
        assert reason.endswith(f"got {found}")


@pytest.mark.parametrize(("name", "most"), [("fa4", 256), ("fa3", 256), ("fa2", 256), ("torch", 256), ("flex", None)])
def test_row_04_head_dims(gpu_of: Any, name: str, most: int | None) -> None:
    gpu_of(9, 0)
    declared = registry.backends()[name].capability
    for dim in (8, 64, 256, 264, 512):
        reason = declared.refusal(CallSpec("cuda", torch.bfloat16, dim, dim, 4, 2))
        assert reason == (None if most is None or dim <= most else f"takes head dims up to {most}, got {dim}")


def test_row_04_an_older_torch_is_told_by_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import flex_attention

    monkeypatch.delattr(flex_attention, "AuxRequest", raising=False)
    flex._missing.cache_clear()
    assert "has no FlexAttention that returns its log-sum-exp" in (flex.FlexAttention().missing() or "")
    flex._missing.cache_clear()


class Ladder:
    """A backend that can be stopped at each rung."""

    name = "ladder"
    capability = Capability(devices=("cuda",), compute_capability=((9, 0), (99, 0)))
    absent: str | None = None

    def missing(self) -> str | None:
        return self.absent


RUNGS = [
    ("package", "is not installed: pip install it"),
    ("package", "is installed but its forward lacks softcap"),
    ("device", "needs a CUDA device for this call, and there is none"),
    ("capability", "needs compute capability 9.0 to below 99.0, got 8.0"),
    ("call", "has no softcap"),
    ("self-test", "is wrong at head dims 80/80 (relative error of dv 1)"),
]


@pytest.mark.parametrize("rung", range(len(RUNGS)), ids=[f"{stage}-{why.split()[1]}" for stage, why in RUNGS])
def test_row_05_the_first_missing_rung_is_told(monkeypatch: pytest.MonkeyPatch, rung: int) -> None:
    """Every rung after the first missing one is missing too, and is not told."""
    backend: Any = Ladder()
    backend.absent = RUNGS[rung][1] if rung < 2 else None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: rung > 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0) if rung <= 3 else (9, 0))
    monkeypatch.setattr(selftest, "failure", lambda backend, spec: RUNGS[5][1])
    spec = CallSpec("cuda", torch.bfloat16, 80, 80, 4, 2, softcap=30.0 if rung <= 4 else 0.0)
    assert doctor.diagnose(backend, spec) == RUNGS[rung]


def test_row_05_a_backend_that_passes_every_rung_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(selftest, "failure", lambda backend, spec: None)
    backend: Any = Ladder()
    assert doctor.diagnose(backend, CallSpec("cuda", torch.bfloat16, 64, 64, 4, 2)) is None


def test_row_05_a_wrong_device_is_told_by_what_the_backend_runs_on() -> None:
    if FlashAttention4().missing() is None:
        pytest.skip("asks for a machine without the package")
    cpu = next(backend for backend in registry.builtin() if backend.name == "cpu")
    stage, reason = doctor.diagnose(cpu, CallSpec("cuda", torch.float32, 16, 16, 4, 2)) or ("", "")
    assert (stage, reason) == ("device", "runs on cpu tensors only, got cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a machine without a GPU")
def test_row_05_the_doctor_fails_where_nothing_can_train(capsys: pytest.CaptureFixture[str]) -> None:
    call = ["doctor", "--heads", "4/2", "--head-dim", "16", "--device", "cuda"]
    assert main([*call, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["auto"] is None
    assert not any(row["accepted"] for row in found["backends"])
    assert main(call) == 1
    assert capsys.readouterr().out.endswith("cannot be trained here: no backend does it exactly.\n")


def test_row_06_the_reference_on_gpus_counts_with_a_warning() -> None:
    findings = [
        {"name": "fa4", "accepted": False, "stage": "call", "reason": "has no dropout"},
        {"name": "reference", "accepted": True, "stage": None, "reason": None},
    ]
    picked = doctor.pick(findings)
    assert picked["auto"] == "reference"
    assert "many times slower" in doctor.warnings_of("cuda", picked)[0]
    assert doctor.warnings_of("cpu", picked) == []


def test_row_06_the_fallback_on_gpus_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And on CPUs, where nobody expects a kernel, not at all."""
    monkeypatch.setattr(registry, "builtin", lambda: (CpuFlash(), Reference()))
    clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for layer in range(3):
            assert registry.choose(replace(SPEC, softcap=1.0)).name == "reference"
            assert registry.choose(CallSpec("cuda", torch.bfloat16, 64 + layer, 64 + layer, 4, 2)).name == "reference"
    (warning,) = caught
    assert "falling back to plain torch: cpu runs on cpu tensors only, got cuda" in str(warning.message)


def test_row_07_a_plug_in_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    plug(monkeypatch, Entry("npu2", lambda: Fake))
    assert list(registry.backends()) == [*BUILTIN[:-1], "npu2", "reference"]
    assert isinstance(registry.choose(SPEC, "npu2"), Fake)
    monkeypatch.setattr(registry, "builtin", lambda: (CpuFlash(), Reference()))
    clear()
    assert registry.choose(SPEC).name == "cpu"
    assert registry.choose(replace(SPEC, softcap=1.0)).name == "npu2"  # the first that can, before the reference


def test_row_07_a_plug_in_that_fails_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    plug(monkeypatch, Entry("npu2", broken), Entry("npu3", lambda: Fake))
    with pytest.warns(UserWarning, match="package:npu2 cannot be loaded: OSError: libascendcl.so is missing"):
        assert list(registry.backends()) == [*BUILTIN[:-1], "npu3", "reference"]
    assert registry.choose(SPEC).name == "cpu"


@pytest.mark.parametrize("name", ["fa4", "reference"])
def test_row_07_a_plug_in_cannot_take_a_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    plug(monkeypatch, Entry(name, lambda: Fake))
    with pytest.warns(UserWarning, match=f"a backend '{name}' exists already; ignored"):
        assert list(registry.backends()) == BUILTIN
    assert not isinstance(registry.backends()[name], Fake)


@pytest.mark.parametrize("backend", [NpuFusion(), XpuFlash()], ids=lambda backend: backend.name)
@pytest.mark.parametrize(
    ("change", "named"),
    [({"softcap": 1.0}, "softcap"), ({"dropout_p": 0.1}, "dropout"), ({"value_dim": 32}, "unequal head dims")],
)
def test_row_07_npu_and_xpu_refuse_by_name(backend: Backend, change: dict[str, object], named: str) -> None:
    asked = {"device": backend.name, "dtype": torch.bfloat16, "head_dim": 64, "value_dim": 64, **change}
    spec = CallSpec(query_heads=4, key_heads=2, **asked)
    assert named in backend.capability.refusal(spec)


def test_row_07_xpu_has_no_window() -> None:
    spec = CallSpec("xpu", torch.bfloat16, 64, 64, 4, 2, window=True)
    assert XpuFlash().capability.refusal(spec) == "has no window"


def test_row_08_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every backend is asked and one computes, with no way out of this machine."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a connection was asked for")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert set(registry.explain(SPEC)) == set(registry.backends())
    q, k, v = (torch.randn(6, heads, 8) for heads in (4, 2, 2))
    assert parallel_attention(q, k, v, Layout(Documents([6]), MeshShape())).isfinite().all()


@pytest.mark.parametrize("name", ["fa4", "fa3", "fa2", "torch"])
def test_row_09_fp32_on_a_half_precision_kernel_is_refused_with_a_hint(name: str) -> None:
    with pytest.raises(NotImplementedError, match=r"got torch.float32: cast the model or use autocast"):
        registry.choose(CallSpec("cuda", torch.float32, 64, 64, 4, 2), name)
    assert registry.choose(CallSpec("cuda", torch.float32, 64, 64, 4, 2), "reference").name == "reference"


@pytest.mark.parametrize(("name", "device"), [*present(), ("flex, eager", "cpu")])
def test_row_10_the_lse_is_natural_wide_and_heads_first(name: str, device: str) -> None:
    """Of scores that are all 0 it is the natural logarithm of the number of keys; of no keys it is -inf."""
    backend = FlexAttention(eager=True) if name == "flex, eager" else registry.backends()[name]
    # float32 where it can be: in half precision torch's CPU kernel approximates exp on some processors (lse 5e-5 off).
    dtype = (backend.capability.dtypes or (torch.float32,))[-1]
    heads, keys, rows = 4, [1, 3, 10, 0], [2, 2, 2, 1]
    blocks = [Block((sum(rows[:i]), sum(rows[: i + 1])), (sum(keys[:i]), sum(keys[: i + 1]))) for i in range(len(keys))]
    q = torch.zeros(sum(rows), heads, 64, device=device, dtype=dtype)
    k, v = (torch.ones(sum(keys), 2, 64, device=device, dtype=dtype) for _ in range(2))
    out = torch.full_like(q, 7.0)
    lse = backend.forward(q, k, v, Call(tuple(blocks)), Options(0.125), out)
    assert lse.shape == (heads, sum(rows))
    assert lse.dtype == torch.float32
    expected = torch.tensor([float(n) for n, r in zip(keys, rows, strict=True) for _ in range(r)], device=device).log()
    torch.testing.assert_close(lse, expected.expand(heads, -1), rtol=1e-5, atol=1e-5)
    assert (out[-1] == 0).all()
    torch.testing.assert_close(out[:-1], torch.ones_like(out[:-1]), rtol=1e-6, atol=0.0)


class TokensFirst(Fake):
    """Its lse is (T, H), as torch's documentation of varlen_attn says."""

    def forward(self, *args: Any) -> Tensor:
        return super().forward(*args).T.contiguous()


def test_row_11_the_self_test_refuses_an_lse_of_another_shape() -> None:
    assert selftest.failure(Fake(), SPEC) is None
    selftest.forget()
    assert "failed its self-test" in (selftest.failure(TokensFirst(), SPEC) or "")
