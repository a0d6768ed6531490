"""Merging partial results: against float64 in any order, empty rows, views; the Triton kernel in its interpreter."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ringattn.kernels.merge import apply_sinks_, merge_, merge_into, plain_merge_, sinks_grad
from tests.kernels.interpreter import INTERPRETED, interpreted, run_interpreted, starts_the_interpreter

Merge = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
PRECISION = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
EMPTY = float("-inf")


def plain_into(acc: Tensor, acc_lse: Tensor, out: Tensor, lse: Tensor, target: Tensor) -> None:
    plain_merge_(acc, acc_lse, out, lse)
    if target is not acc:
        target.copy_(acc)


def triton_into(acc: Tensor, acc_lse: Tensor, out: Tensor, lse: Tensor, target: Tensor) -> None:
    from ringattn.kernels import merge_triton

    merge_triton.merge_into(acc, acc_lse, out, lse, target)


KERNELS = [
    pytest.param(plain_into, "cpu", id="plain"),
    pytest.param(
        triton_into,
        "cpu",
        id="interpreted",
        marks=interpreted,
    ),
    pytest.param(
        triton_into,
        "cuda",
        id="triton",
        marks=[pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="compiled kernels only")],
    ),
]
# rows, heads, value head dim
SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 3), st.sampled_from([1, 8, 40, 64, 80, 128, 256]))


def partials(seed: int, count: int, shape: tuple[int, int, int], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Partial results (n, H, V), (H, n) of which about a third of the rows have no keys."""
    generator = torch.Generator().manual_seed(seed)
    n, heads, dim = shape
    parts = []
    for _ in range(count):
        lse = torch.randn(heads, n, generator=generator) * 8
        empty = torch.rand(heads, n, generator=generator) < 0.3
        out = torch.randn(n, heads, dim, generator=generator)
        parts.append((out.masked_fill(empty.T[..., None], 0).to(dtype), lse.masked_fill(empty, EMPTY)))
    return parts


def expected(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """All partial results at once, in float64."""
    lses = torch.stack([lse for _, lse in parts]).double()
    total = torch.logsumexp(lses, 0)
    weights = torch.exp(lses - total.masked_fill(total == EMPTY, 0.0))
    outs = torch.stack([out for out, _ in parts]).double()
    return (outs * weights.transpose(1, 2)[..., None]).sum(0), total


def fresh(shape: tuple[int, int, int], device: str = "cpu") -> tuple[Tensor, Tensor]:
    n, heads, dim = shape
    return torch.zeros(n, heads, dim, device=device), torch.full((heads, n), EMPTY, device=device)


def assert_same(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.double().cpu(), wanted.double().cpu(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("kernel", "device"), KERNELS)
@settings(max_examples=30)
@given(
    shape=SHAPES,
    count=st.integers(1, 6),
    seed=st.integers(0, 1 << 30),
    dtype=st.sampled_from(list(PRECISION)),
    order=st.randoms(use_true_random=False),
)
def test_merged_parts_equal_the_whole_in_any_order(kernel, device, shape, count, seed, dtype, order) -> None:
    parts = partials(seed, count, shape, dtype)
    out, lse = expected(parts)
    order.shuffle(parts)
    acc, acc_lse = fresh(shape, device)
    for part_out, part_lse in parts:
        kernel(acc, acc_lse, part_out.to(device), part_lse.to(device), acc)
    assert_same(acc, out, 1e-5)
    assert_same(acc_lse, lse, 1e-5)


@pytest.mark.parametrize("dtype", list(PRECISION))
@pytest.mark.parametrize(("kernel", "device"), KERNELS)
def test_the_last_merge_writes_the_rounded_rows(kernel: Merge, device: str, dtype: torch.dtype) -> None:
    """The target may be the part itself, as where a kernel wrote its part into the final rows."""
    shape = (19, 3, 64)
    (first, first_lse), (second, second_lse) = partials(5, 2, shape, dtype)
    out, lse = expected([(first, first_lse), (second, second_lse)])
    for in_place in (True, False):
        acc, acc_lse = fresh(shape, device)
        kernel(acc, acc_lse, first.to(device), first_lse.to(device), acc)
        part = second.to(device, copy=True)
        target = part if in_place else torch.empty_like(part)
        kernel(acc, acc_lse, part, second_lse.to(device), target)
        assert_same(target, out.to(dtype), PRECISION[dtype])
        assert_same(acc_lse, lse, 1e-5)


@pytest.mark.parametrize(("kernel", "device"), KERNELS)
def test_a_part_without_keys_changes_nothing(kernel: Merge, device: str) -> None:
    shape = (7, 2, 64)
    [(out, lse)] = partials(0, 1, shape, torch.float32)
    acc, acc_lse = out.to(device, copy=True), lse.to(device, copy=True)
    zeros, empty = fresh(shape, device)
    for _ in range(2):
        kernel(acc, acc_lse, zeros.bfloat16(), empty, acc)
    assert acc.cpu().equal(out)
    assert_same(acc_lse, lse, 1e-6)


@pytest.mark.parametrize(("kernel", "device"), KERNELS)
def test_rows_without_keys_anywhere_stay_zero(kernel: Merge, device: str) -> None:
    acc, acc_lse = fresh((5, 2, 40), device)
    kernel(acc, acc_lse, torch.zeros_like(acc), torch.full_like(acc_lse, EMPTY), acc)
    assert not acc.any()
    assert (acc_lse == EMPTY).all()


@pytest.mark.parametrize(("kernel", "device"), KERNELS)
def test_in_place_on_views_and_nowhere_else(kernel: Merge, device: str) -> None:
    """Rows of larger tensors, columns of their log-sum-exps, and a head slice: as the executor calls it."""
    parts = partials(3, 2, (20, 3, 64), torch.bfloat16)
    out, lse = expected([(out[4:17, 1:], lse[1:, 4:17]) for out, lse in parts])
    whole, whole_lse = torch.full((20, 3, 64), 7.0, device=device), torch.full((3, 20), 7.0, device=device)
    acc, acc_lse = whole[4:17, 1:], whole_lse[1:, 4:17]
    acc.zero_(), acc_lse.fill_(EMPTY)
    for part_out, part_lse in parts:
        part_out, part_lse = part_out.to(device), part_lse.to(device)
        kernel(acc, acc_lse, part_out[4:17, 1:], part_lse[1:, 4:17], acc)
    assert_same(acc, out, 1e-5)
    assert_same(acc_lse, lse, 1e-5)
    acc.fill_(7.0), acc_lse.fill_(7.0)
    assert (whole == 7).all()
    assert (whole_lse == 7).all()


@pytest.mark.parametrize(("kernel", "device"), KERNELS)
def test_no_rows_are_merged_without_an_error(kernel: Merge, device: str) -> None:
    acc, acc_lse = fresh((0, 2, 64), device)
    kernel(acc, acc_lse, acc.clone(), acc_lse.clone(), acc)


@pytest.mark.parametrize(("kernel", "device"), KERNELS)
def test_log_sum_exps_far_apart(kernel: Merge, device: str) -> None:
    acc, acc_lse = torch.ones(3, 1, 8, device=device), torch.tensor([[500.0, -500.0, 0.0]], device=device)
    lse = torch.tensor([[-500.0, 500.0, 0.0]], device=device)
    kernel(acc, acc_lse, torch.full_like(acc, 3.0), lse, acc)
    assert_same(acc[:, 0, 0], torch.tensor([1.0, 3.0, 2.0]), 1e-6)
    assert_same(acc_lse, torch.tensor([[500.0, 500.0, 0.6931472]]), 1e-6)


@pytest.mark.slow
@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_interpreted(__file__, 9)


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, ringattn, ringattn.kernels.merge; sys.exit('ringattn.kernels.merge_triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entry_points_on_cpu(dtype: torch.dtype) -> None:
    shape = (6, 2, 8)
    parts = partials(1, 2, shape, torch.float32)
    out, lse = expected(parts)
    acc, acc_lse = (x.to(dtype) for x in fresh(shape))
    merge_(acc, acc_lse, parts[0][0].to(dtype), parts[0][1].to(dtype))
    target = torch.empty(shape, dtype=torch.bfloat16)
    merge_into(acc, acc_lse, parts[1][0].to(dtype), parts[1][1].to(dtype), target)
    assert_same(target, out.bfloat16(), 8e-3)
    assert_same(acc_lse, lse, 1e-5)


def test_a_sink_is_a_key_whose_value_is_zero() -> None:
    """out, lse and the gradient of `apply_sinks_` are those of softmax over one more logit; an empty row stays 0."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(2, 5, 9, generator=generator, dtype=torch.float64)
    scores[:, 1] = EMPTY
    values = torch.randn(2, 9, 4, generator=generator, dtype=torch.float64)
    sinks = torch.randn(2, generator=generator, dtype=torch.float64, requires_grad=True)
    wider = torch.cat([scores, sinks[:, None, None].expand(2, 5, 1)], -1)
    wanted = (wider.softmax(-1)[..., :-1] @ values).transpose(0, 1)
    dout = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    wanted.backward(dout)
    weights = scores.softmax(-1).nan_to_num(0.0)
    out, lse = (weights @ values).transpose(0, 1).contiguous(), scores.logsumexp(-1)
    apply_sinks_(out, lse, sinks.detach())
    assert_same(out, wanted.detach(), 1e-12)
    assert_same(lse, wider.detach().logsumexp(-1), 1e-12)
    assert sinks.grad is not None
    assert_same(sinks_grad(dout, out, lse, sinks.detach()), sinks.grad, 1e-12)
