"""Scale, softcap, sinks and head dims of the front door, against a dense softmax."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ringattn import Documents, Layout, MeshShape, parallel_attention
from ringattn.kernels import registry
from tests.small_tensors import CAUSAL, LAYOUT, dense, tensors


def test_the_scale_is_that_of_the_queries_head_dim() -> None:
    out = parallel_attention(*tensors((24, 12)), LAYOUT)
    torch.testing.assert_close(out, dense(CAUSAL, 24**-0.5, dims=(24, 12))[0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(out, dense(CAUSAL, 12**-0.5, dims=(24, 12))[0], atol=1e-3)


def test_scores_are_capped_before_the_mask_and_in_the_lse() -> None:
    out, lse = parallel_attention(*tensors(), LAYOUT, softcap=2.0, return_lse=True)
    for got, expected in zip((out, lse), dense(CAUSAL, softcap=2.0), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    other = parallel_attention(*tensors(), LAYOUT, softcap=3.0)
    assert (out - other).abs().max() > 1e-3


def test_gradients_are_those_of_finite_differences() -> None:
    small = Layout(Documents([4, 2]), MeshShape())
    inputs = [x[:6, :, :2].contiguous().requires_grad_() for x in tensors()]
    assert torch.autograd.gradcheck(lambda *x: parallel_attention(*x, small, softcap=2.0), inputs)


def test_zero_and_none_are_off_and_wrong_caps_are_refused() -> None:
    plain = parallel_attention(*tensors(), LAYOUT, backend="reference")
    for off in (None, 0.0):
        assert torch.equal(plain, parallel_attention(*tensors(), LAYOUT, softcap=off, backend="reference"))
    for wrong in (-1.0, math.nan):
        with pytest.raises(ValueError, match=f"softcap must be >= 0 .* got {wrong}"):
            parallel_attention(*tensors(), LAYOUT, softcap=wrong)


def test_a_sink_is_a_key_of_value_zero() -> None:
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain, lse = dense(CAUSAL)
    expected = plain * torch.sigmoid(lse - sinks[:, None]).T[..., None]
    torch.testing.assert_close(parallel_attention(*tensors(), LAYOUT, sinks=sinks), expected, rtol=1e-12, atol=1e-12)
    assert (plain - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", ["sinks", "s_aux", "learnable_sink", "softmax_aux"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_sinks_train_under_every_name(name: str, backend: str) -> None:
    sinks = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    keywords: Any = {name: sinks}
    parallel_attention(*tensors(), LAYOUT, backend=backend, **keywords).square().sum().backward()
    assert sinks.grad is not None
    assert (sinks.grad.abs() > 1e-3).all()


def test_large_heads_are_exact() -> None:
    outs = [parallel_attention(*tensors((512, 512)), LAYOUT, backend=name) for name in ("cpu", "reference")]
    torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)


def both_ways(backend: str) -> list[Tensor]:
    x = [y.requires_grad_() for y in tensors()]
    out = parallel_attention(*x, LAYOUT, deterministic=True, backend=backend)
    return [out, *torch.autograd.grad(out.square().sum(), x)]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_two_runs_are_equal_bit_by_bit(backend: str) -> None:
    assert registry.backends()[backend].capability.deterministic
    assert all(torch.equal(a, b) for a, b in zip(both_ways(backend), both_ways(backend), strict=True))
