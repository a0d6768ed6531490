"""The kernel that all rows share: it counts, it is the real one, and dry it writes zeros."""

import pytest
import torch
from torch import Tensor

from benchmarks.training.kernel import Counts, backward_buffers, forward_buffers, measured_kernel
from ringattn.kernels import registry
from ringattn.kernels.spec import Block, Call, CallSpec, Grads, Options, SavedCall, Sum

SPEC = CallSpec("cpu", torch.float32, 16, 16, 4, 2)
CALL = Call((Block((0, 30), (0, 30), -1, 0), Block((30, 50), (30, 50), -1, 0)), -1, 0)


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(50, 4, 16), torch.randn(50, 2, 16), torch.randn(50, 2, 16)


def test_it_is_the_real_one_unless_it_is_dry() -> None:
    q, k, v = tensors()
    options, out = Options(0.25), torch.full((50, 4, 16), 7.0)
    wanted = torch.empty_like(out)
    lse = registry.choose(SPEC).forward(q, k, v, CALL, options, wanted)
    with measured_kernel(SPEC) as kernel:
        kernel.counts = Counts()
        with kernel.dry():
            zeros = kernel.forward(q, k, v, CALL, options, out)
            assert not out.any()
            assert not zeros.any()
            assert zeros.shape == lse.shape
            assert zeros.dtype == lse.dtype
        found = registry.choose(SPEC, kernel.name).forward(q, k, v, CALL, options, out)
        assert torch.equal(out, wanted)
        assert torch.equal(found, lse)
        assert kernel.counts == Counts(2, 0)
    with pytest.raises(ValueError, match="backend must be"):
        registry.choose(SPEC, kernel.name)


def test_dry_gradients_are_zeros_and_sums_stay() -> None:
    q, k, v = tensors()
    grads = [torch.full_like(x, 7.0) for x in (q, k, v)]
    fresh, begun = (Sum((0, 50), torch.full((50, 2, 16), 7.0), fresh) for fresh in (True, False))
    with measured_kernel(SPEC) as kernel, kernel.dry():
        saved = SavedCall(q, k, v, torch.zeros_like(q), torch.zeros(4, 50), CALL, Options(0.25))
        kernel.backward(torch.ones_like(q), saved, Grads(*grads, (None, fresh, begun)))
    assert not any(x.any() for x in grads)
    assert not fresh.wide.any()
    assert (begun.wide == 7.0).all()  # nothing is added to it


def size_of(buffers: list[tuple[tuple[int, ...], torch.dtype]]) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in buffers)


@pytest.mark.parametrize("name", ["fa3", "fa4"])
def test_what_flash_attention_allocates_backward(name: str) -> None:
    """Float32 sums of dq, and of dk and dv where heads share keys; two float32 a row and head."""
    rows = 2**17
    call = Call((Block((0, rows), (0, rows), -1, 0),), -1, 0)
    q, k = torch.empty(rows, 32, 128, device="meta"), torch.empty(rows, 8, 128, device="meta")
    saved = SavedCall(q, k, k, q, torch.empty(32, rows, device="meta"), call, Options(1.0))
    wanted = rows * (4 * 32 * 128 + 2 * 4 * 8 * 128 + 2 * 4 * 32)
    assert size_of(backward_buffers(name, saved)) == pytest.approx(wanted, rel=2e-3)
    alone = saved._replace(k=q, v=q)
    assert size_of(backward_buffers(name, alone)) == pytest.approx(rows * (4 * 32 * 128 + 2 * 4 * 32), rel=2e-3)
    assert forward_buffers(name, q, k) == []


def test_torchs_kernel_has_results_of_its_own() -> None:
    q, k = torch.empty(64, 4, 16, dtype=torch.bfloat16), torch.empty(64, 2, 16, dtype=torch.bfloat16)
    assert size_of(forward_buffers("torch", q, k)) == 64 * 4 * 16 * 2
