"""Which backend is trusted: the self-test finds what is wrong, once, and leaves no trace."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from ringattn.kernels import registry, selftest
from ringattn.kernels.backends.flex import FlexAttention
from ringattn.kernels.spec import Call, Options
from tests.kernels.fake_backends import SPEC, Entry, Fake, plug

pytestmark = pytest.mark.usefixtures("fresh_caches")


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


class TokensFirst(Fake):
    """Its lse is (T, H), as torch's documentation of varlen_attn says."""

    def forward(self, *args: Any) -> Tensor:
        return super().forward(*args).T.contiguous()


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


def test_the_self_test_refuses_an_lse_of_another_shape() -> None:
    assert selftest.failure(Fake(), SPEC) is None
    selftest.forget()
    assert "failed its self-test" in (selftest.failure(TokensFirst(), SPEC) or "")


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


def test_the_self_test_is_not_seen_by_a_layer_that_is_computed_again() -> None:
    """It runs in the first forward pass of a layer, where checkpointing counts the tensors that autograd saves."""
    runs: list[str | None] = []

    def layer(x: Tensor) -> Tensor:
        runs.append(selftest.failure(FlexAttention(eager=True), SPEC))
        return x.sin().cos()

    x = torch.ones(3, requires_grad=True)
    for context in (noop_context_fn, lambda: create_selective_checkpoint_contexts([torch.ops.aten.mm.default])):
        selftest.forget()
        runs.clear()
        out = checkpoint(layer, x, use_reentrant=False, context_fn=context)
        assert runs == [None]
        out.sum().backward()
        assert runs == [None, None]
