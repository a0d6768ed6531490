"""Kernels of recurrences on GPUs against float64, beside plain torch in the same dtype: alone and split over ranks."""

import pytest
import torch

from ringattn import Documents, Layout
from ringattn.recurrent import parallel_recurrence
from ringattn.recurrent.kernels import selftest
from ringattn.recurrent.kernels.chunked import Chunked
from ringattn.recurrent.kernels.contract import Inputs, Kernel, Signature
from ringattn.recurrent.kernels.registry import KERNELS, choose_kernel, refusal
from ringattn.recurrent.kernels.taps import TapsSignature, fused_refusal
from tests.parallel.ranks import mesh_of
from tests.pool import Pools
from tests.recurrent.problems import RULES, alone, inputs
from tests.recurrent.test_recurrence import layouts_of, spread

FUSED = ("mamba", "fla")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# To the largest error of plain torch, which multiplies in float32 and rounds outputs and gradients once: a fused kernel
# rounds what it multiplies within a chunk as well.
RATIO = 4.0
SPLIT = 1.1  # of a split run to the same kernel's on one rank, in any of outputs and gradients
LEAST = 2.0**-10  # half of bfloat16's rounding: sums that happen to be better say nothing
HEADS, DIMS = (4, 8), (128, 64)
DOCS = Documents([1500, 5, 0, 700, 64, 1], total=2300)


def signature_of(rule: str, dtype: torch.dtype) -> Signature:
    delta, diagonal = RULES[rule]
    wide = torch.float32
    dtypes = (dtype, dtype, wide, dtype if delta else None, wide if rule == "steps" else None)
    return Signature("cuda", dtypes, *HEADS, *DIMS, diagonal)


def fused(name: str, signature: Signature) -> Kernel:
    """The kernel, or a skipped test where it is not made for the call or not installed."""
    kernel = KERNELS[name]
    stopped = refusal(kernel, signature)
    if stopped is not None and stopped[0] != "self-test":
        pytest.skip(f"{name} {stopped[1]}")
    return kernel


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", FUSED)
def test_a_kernel_against_float64(name: str, rule: str, dtype: torch.dtype) -> None:
    signature = signature_of(rule, dtype)
    kernel = fused(name, signature)
    for case, judge in selftest.cases(signature):
        problem = selftest.drawn(case, (1000, 1, 64, 130, 3))
        errors = judge(kernel, *problem)
        limit = RATIO * max(judge(Chunked(), *problem).values())
        print(name, rule, dtype, {key: f"{error:.1e}" for key, error in errors.items()}, f"limit {limit:.1e}")
        if dtype == torch.float32:  # products of TF32 are refused, right ones kept
            assert (selftest.failure(kernel, signature) is None) == (max(errors.values()) <= 1e-4)
        else:
            assert selftest.failure(kernel, signature) is None
            assert max(errors.values()) <= limit, errors


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [2, 3, 4])
def test_a_convolution_against_float64(width: int, dtype: torch.dtype) -> None:
    """Its self-test is the comparison, forward and backward."""
    reasons = {fused_refusal(TapsSignature("cuda", dtype, 512, width, bias, True)) for bias in (True, False)}
    if any("install" in (reason or "") for reason in reasons):
        pytest.skip(f"causal-conv1d {reasons.pop()}")
    assert reasons == {None}


def drawn(rule: str) -> tuple[Inputs, torch.Tensor]:
    """Inputs in the dtypes that models give, and gradients of the outputs."""
    wide = inputs(rule, DOCS.total, HEADS, DIMS)
    q, k, v = (one.bfloat16() for one in wide[:3])
    beta = None if wide.beta is None else wide.beta.bfloat16()
    x = Inputs(q * DIMS[0] ** -0.5, k, v, wide.decay.float(), beta, None if wide.step is None else wide.step.float())
    return x, torch.randn(v.shape, generator=torch.Generator().manual_seed(3)).bfloat16()


def errors_of(found: list[torch.Tensor], rule: str) -> list[float]:
    """Of outputs and gradients, relative to float64."""
    x, dout = drawn(rule)
    truth = alone(Inputs(*(None if one is None else one.double().cuda() for one in x)), DOCS, dout.double().cuda())
    right = [truth.out, *truth.grads]
    if rule == "steps":  # a kernel may put the gradient of a rate into any row
        right[4], found[4] = right[4].sum(0), found[4].sum(0)
    return [float((a.double().cpu() - b.cpu()).norm() / b.cpu().norm()) for a, b in zip(found, right, strict=True)]


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["contiguous", "zigzag", "balanced"])
@pytest.mark.parametrize("route", ["scan", "exchange"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", FUSED)
def test_a_split_is_as_accurate_as_the_kernel(name: str, rule: str, route: str, policy: str) -> None:
    """Four ranks as threads on one device."""
    kernel = fused(name, signature_of(rule, torch.bfloat16))
    x, dout = drawn(rule)
    on_gpu = Inputs(*(None if one is None else one.cuda() for one in x))
    single = spread(on_gpu, layouts_of(DOCS, 1, 1, "contiguous"), dout.cuda(), "scan", kernel)
    split = spread(on_gpu, layouts_of(DOCS, 4, 1, policy), dout.cuda(), route, kernel)
    whole, parts = errors_of([single.out, *single.grads], rule), errors_of([split.out, *split.grads], rule)
    print(name, rule, route, policy, [f"{b / a:.3f}" for a, b in zip(whole, parts, strict=True)])
    assert all(part <= SPLIT * max(one, LEAST) for part, one in zip(parts, whole, strict=True)), (parts, whole)


def on_rank(rule: str, ring: int, route: str) -> list[torch.Tensor]:
    layout = Layout(DOCS, mesh_of(ring, 1, "cuda"), "balanced")
    x, dout = drawn(rule)
    leaves = Inputs(*(None if one is None else layout.shard(one.cuda()).clone().requires_grad_() for one in x))
    q, k, v, decay, beta, step = leaves
    if step is not None:
        decay = decay[0]
    out = parallel_recurrence(q, k, v, layout, decay=decay, beta=beta, step=step, route=route)
    out.backward(layout.shard(dout.cuda()))
    return [layout.unshard(one.detach()).cpu() for one in (out, *(one.grad for one in leaves if one is not None))]


@pytest.mark.gpu(2)
@pytest.mark.parametrize("route", ["scan", "exchange"])
@pytest.mark.parametrize("rule", RULES)
def test_over_nccl(pool: Pools, rule: str, route: str) -> None:
    """The kernel that "auto" takes, whichever it is."""
    x, dout = drawn(rule)
    on_gpu = Inputs(*(None if one is None else one.cuda() for one in x))
    kernel = choose_kernel(signature_of(rule, torch.bfloat16))
    single = spread(on_gpu, layouts_of(DOCS, 1, 1, "contiguous"), dout.cuda(), "scan", kernel)
    whole = errors_of([single.out, *single.grads], rule)
    for found in pool(2, "cuda").run(on_rank, rule, 2, route):
        parts = errors_of(list(found), rule)
        assert all(part <= SPLIT * max(one, LEAST) for part, one in zip(parts, whole, strict=True)), (parts, whole)
