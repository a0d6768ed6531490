"""causal-conv1d's convolution: what it is given and gives, and when it is trusted."""

import re
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ringattn import Documents, Layout, MeshShape
from ringattn.recurrent import convolution, parallel_convolution
from ringattn.recurrent.kernels import taps
from ringattn.recurrent.kernels.taps import TapsSignature, choose_taps, fused, fused_refusal, torchs
from tests.recurrent.test_convolution import on_threads
from tests.strategies import documents

pytestmark = pytest.mark.usefixtures("fresh_caches")

CALL = TapsSignature("cpu", torch.float32, 8, 4, True, True)


def install(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Any] = lambda out: out) -> list[Any]:
    """The package, on CPU tensors, perhaps with a fault. Returns what it is called with."""
    calls: list[Any] = []

    def causal_conv1d_fn(
        x: Tensor, weight: Tensor, bias: Any = None, seq_idx: Any = None, initial_states: Any = None,
        return_final_states: bool = False, final_states_out: Any = None, activation: Any = None,
    ) -> Tensor:  # fmt: skip
        assert x.stride(1) == 1, "rows do not stand channel by channel"
        calls.append((x.shape, seq_idx, activation))
        numbers = torch.zeros(x.shape[::2], dtype=torch.int32) if seq_idx is None else seq_idx
        assert numbers.dtype == torch.int32
        assert numbers.is_contiguous()
        outs = [F.conv1d(F.pad(one, (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=x.shape[1])
                for one in x.split(numbers[0].unique_consecutive(return_counts=True)[1].tolist(), 2)]  # fmt: skip
        out = torch.cat(outs, 2)
        return change(F.silu(out) if activation == "silu" else out)

    module = ModuleType("causal_conv1d")
    module.__spec__ = ModuleSpec("causal_conv1d", None)
    module.causal_conv1d_fn = causal_conv1d_fn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "causal_conv1d", module)
    monkeypatch.setattr(taps, "DEVICES", ("cpu",))
    return calls


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_both_compute_the_same(width: int, bias: bool, silu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    x, weight, shift = torch.randn(9, 8).double(), torch.randn(8, width).double(), torch.randn(8).double()
    for lengths in ((9,), (1, 5, 2, 1)):
        given = x, lengths, weight, shift if bias else None, silu
        torch.testing.assert_close(fused(*given), torchs(*given), rtol=1e-12, atol=1e-12)
    for dtype in (torch.float32, torch.bfloat16):
        assert choose_taps(TapsSignature("cpu", dtype, 8, width, bias, silu)) is fused


def test_the_front_door_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(Documents([9, 1, 20]), MeshShape())
    x, weight = torch.randn(30, 8), torch.randn(8, 4)
    expected = parallel_convolution(x, weight, None, layout, activation="silu")
    choose_taps.cache_clear()
    calls = install(monkeypatch)
    torch.testing.assert_close(parallel_convolution(x, weight, None, layout, activation="silu"), expected)
    shape, seq_idx, activation = calls[-1]
    assert (shape, activation) == ((1, 8, 30), "silu")
    assert seq_idx[0].tolist() == [0] * 9 + [1] + [2] * 20


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_over_any_layout_it_is_torchs(data: st.DataObject) -> None:
    """Outputs and gradients over ranks, padding and pieces in any order."""
    docs = data.draw(documents(longest=20, most=4))
    ring, policy = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from(["zigzag", "balanced"]))
    layouts = [Layout(docs, MeshShape(1, ring, 1, rank), policy) for rank in range(ring)]
    x, dout = torch.randn(2, docs.total, 8).double()
    tensors = x, dout, torch.randn(8, data.draw(st.integers(2, 4))).double(), torch.randn(8).double()
    expected = on_threads(layouts, *tensors)
    with pytest.MonkeyPatch.context() as patch:
        calls = install(patch)
        patch.setattr(convolution, "choose_taps", lambda signature: fused)
        taps._function.cache_clear()
        found = on_threads(layouts, *tensors)
    taps._function.cache_clear()
    assert calls or not any(docs.lengths)
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda out: out * 1.1, "is wrong at 4 taps .relative error of out 0.1"),
        (lambda out: out.detach() * 0.9 + out * 0.1, "is wrong at 4 taps .relative error of dx 0.9"),
        (lambda out: 1 / 0, "failed its self-test: ZeroDivisionError"),
    ],
    ids=["output", "gradients", "raises"],
)
def test_a_wrong_one_is_not_taken(change: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, change)
    assert choose_taps(CALL) is torchs
    assert re.match(words, fused_refusal(CALL) or "")


def test_what_it_is_not_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused_refusal(CALL) == "runs on cuda tensors only, got cpu"
    assert fused_refusal(CALL._replace(device="cuda")) == "is not installed: pip install causal-conv1d"
    install(monkeypatch)
    for changes in ({"width": 5}, {"width": 1}, {"channels": 12}):
        assert "takes 2 to 4 taps and a multiple of 8 channels, got" in str(fused_refusal(CALL._replace(**changes)))
    assert "got float64" in str(fused_refusal(CALL._replace(dtype=torch.float64)))
