"""Which packages are found: by distribution and by what their functions take, with a reason where one is refused."""

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ringattn.kernels.backends import fa2, fa3, fa4, flex, npu, xpu
from ringattn.kernels.probing import parameters, require
from ringattn.kernels.spec import Backend
from tests.caches import clear_caches
from tests.kernels.backends import fakes


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_caches: None) -> Path:
    """An empty site-packages, in which nothing of the real one is seen."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("flash_attn", "torch_npu", "xformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(x for x in sys.path if "-packages" not in x)])
    monkeypatch.delenv(fa3.LIBRARY, raising=False)
    importlib.invalidate_caches()
    return tmp_path


def install(site: Path, distribution: str) -> None:
    folder = site / f"{distribution.replace('-', '_')}-2.8.3.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 2.8.3\n")


def importable(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """A module that is imported already, and its parents."""
    module = ModuleType(name)
    module.__dict__.update(content)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, child = name.rpartition(".")
    if parent:
        if parent not in sys.modules:
            importable(monkeypatch, parent)
        monkeypatch.setattr(sys.modules[parent], child, module, raising=False)


def fa2_functions(**changes: Any) -> dict[str, Any]:
    forward, backward = fakes.fa2([])
    return {"_flash_attn_varlen_forward": forward, "_flash_attn_varlen_backward": backward, **changes}


def fa4_functions() -> dict[str, Any]:
    def forward(
        q, k, v, *, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, softcap,
        window_size_left, window_size_right, return_lse, out,
    ):  # fmt: skip
        raise AssertionError

    def backward(
        q, k, v, out, dout, lse, *, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k, softmax_scale,
        causal, softcap, window_size_left, window_size_right, deterministic, dq, dk, dv,
    ):  # fmt: skip
        raise AssertionError

    return {"_flash_attn_fwd": forward, "_flash_attn_bwd": backward}


def both_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the wheel of FlashAttention-2 has it, which also contains `flash_attn/cute`."""
    importable(monkeypatch, "flash_attn.flash_attn_interface", **fa2_functions())
    importable(monkeypatch, "flash_attn.cute.interface", **fa4_functions())


def test_parameters_of_functions_and_operators() -> None:
    assert parameters(lambda q, *, scale: None) == {"q", "scale"}
    assert {"dropout_p", "is_causal", "scale"} <= parameters(torch.ops.aten._flash_attention_forward)
    with pytest.raises(ImportError, match="f lacks alibi, sinks"):
        require(lambda q: None, "f", {"q", "sinks", "alibi"})


class Libraries:
    """Stands for the loader of shared libraries: one of them registers the operators, the others fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if hasattr(torch.ops.flash_attn_3, "fwd"):
            pytest.skip("FlashAttention-3 is loaded in this process")
        self.loaded: list[str] = []
        self.good: Path | None = None
        self.operators: Any = None
        monkeypatch.setattr(torch.ops, "load_library", self.load)
        monkeypatch.setattr(fa3.ctypes, "CDLL", lambda path, mode: self.loaded.append(path))

    def load(self, path: str) -> None:
        self.loaded.append(path)
        if path != str(self.good):
            raise OSError("undefined symbol")
        self.operators = fakes.fa3([])

    def unload(self) -> None:
        clear_caches()
        if self.operators is not None:
            self.operators._destroy()
        for name in ("fwd", "bwd"):
            torch.ops.flash_attn_3.__dict__.pop(name, None)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[Libraries]:
    made = Libraries(monkeypatch)
    yield made
    made.unload()


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_fa3_placeholder_is_not_enough(site: Path, libraries: Libraries) -> None:
    install(site, "flash-attn-3")
    touch(site / "flash_attn_3" / "__init__.py")
    reason = fa3.FlashAttention3().missing() or ""
    assert "is not installed: pip install xformers" in reason
    assert "flash_attn_3._C: ModuleNotFoundError" in reason


def test_fa3_of_xformers_without_importing_it(site: Path, libraries: Libraries) -> None:
    (touch(site / "xformers" / "__init__.py")).write_text("raise AssertionError('imported')")
    libraries.good = touch(site / "xformers" / "flash_attn_3" / "_C.so")
    runtime = touch(site / "nvidia" / "cuda_runtime" / "lib" / "libcudart.so.12")
    assert fa3.FlashAttention3().missing() is None
    assert libraries.loaded == [str(runtime), str(libraries.good)]


def test_fa3_library_of_the_environment_and_retry(
    monkeypatch: pytest.MonkeyPatch, site: Path, libraries: Libraries
) -> None:
    library = touch(site / "elsewhere" / "_C.so")
    runtime = touch(site / "elsewhere" / "libcudart.so.12")
    monkeypatch.setenv(fa3.LIBRARY, str(library))
    reason = fa3.FlashAttention3().missing() or ""
    assert f"{fa3.LIBRARY}={library}: OSError: undefined symbol" in reason
    libraries.good = library
    assert fa3.FlashAttention3().missing() is None
    assert libraries.loaded == [str(runtime), str(library)] * 2


def test_npu_and_xpu_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "needs torch_npu, which cannot be imported" in (npu.NpuFusion().missing() or "")
    importable(monkeypatch, "torch_npu")
    if not hasattr(torch.ops.npu, "npu_fusion_attention"):
        assert "npu_fusion_attention is missing" in (npu.NpuFusion().missing() or "")
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    assert "needs an Intel GPU" in (xpu.XpuFlash().missing() or "")
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: "backward" not in name)
    assert "has no _scaled_dot_product_flash_attention_backward on XPU" in (xpu.XpuFlash().missing() or "")


def test_a_failed_load_is_tried_again(monkeypatch: pytest.MonkeyPatch, site: Path) -> None:
    for distribution in ("flash-attn", "flash-attn-4"):
        install(site, distribution)
    for backend in (fa2.FlashAttention2(), fa4.FlashAttention4()):
        assert "is installed but cannot be imported: ModuleNotFoundError" in (backend.missing() or "")
    both_modules(monkeypatch)
    for backend in (fa2.FlashAttention2(), fa4.FlashAttention4()):
        assert backend.missing() is None


@pytest.mark.parametrize(
    ("distribution", "found", "other"),
    [("flash-attn-4", fa4.FlashAttention4(), fa2.FlashAttention2()), ("flash-attn", fa2.FlashAttention2(), None)],
)
def test_the_distribution_decides(
    monkeypatch: pytest.MonkeyPatch, site: Path, distribution: str, found: Backend, other: Backend | None
) -> None:
    both_modules(monkeypatch)
    other = other or fa4.FlashAttention4()
    assert "is not installed: pip install" in (found.missing() or "")
    install(site, distribution)
    assert found.missing() is None
    assert "is not installed: pip install" in (other.missing() or "")


def test_the_signature_decides_too(monkeypatch: pytest.MonkeyPatch, site: Path) -> None:
    for distribution in ("flash-attn", "flash-attn-4"):
        install(site, distribution)
    both_modules(monkeypatch)
    monkeypatch.setattr("flash_attn.flash_attn_interface._flash_attn_varlen_forward", lambda q, k, v, window_size: None)
    reason = fa2.FlashAttention2().missing() or ""
    assert "is installed but its _flash_attn_varlen_forward lacks" in reason
    assert "window_size_left" in reason
    monkeypatch.delattr("flash_attn.cute.interface._flash_attn_bwd")
    assert "_flash_attn_bwd is missing" in (fa4.FlashAttention4().missing() or "")


def test_an_older_torch_is_told_by_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import flex_attention

    monkeypatch.delattr(flex_attention, "AuxRequest", raising=False)
    assert "has no FlexAttention that returns its log-sum-exp" in (flex.FlexAttention().missing() or "")
