"""More numbers than an int32 can count, on GPUs: the last document of a long pack is what it is by itself."""

import pytest
import torch

from ringattn.recurrent.kernels.contract import Inputs, Kernel, Signature
from ringattn.recurrent.kernels.registry import KERNELS, refusal
from ringattn.recurrent.kernels.taps import TapsSignature, by_channels, choose_taps
from tests.recurrent.problems import RULES

LENGTH, HEADS, DIM = 2000, (8, 32), 128
COUNT = 2**31 // (HEADS[1] * DIM * LENGTH) + 3
pytestmark = pytest.mark.gpu


def drawn(rule: str, tokens: int) -> Inputs:
    """Rows in the dtypes that models give."""
    delta, diagonal = RULES[rule]
    (K, H), half = HEADS, {"dtype": torch.bfloat16, "device": "cuda"}
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.empty(tokens, *sizes, **half).normal_(generator=generator)  # type: ignore[arg-type]

    k = torch.nn.functional.normalize(draw(K, DIM), dim=-1)
    decay = -0.3 * (draw(H, DIM) if diagonal else draw(H)).float().abs()
    step = draw(H).float().abs() if rule == "steps" else None
    if step is not None:
        decay = -torch.linspace(0.1, 1.0, H, device="cuda").expand(tokens, H)
    beta = draw(H).sigmoid() if delta else None
    return Inputs(draw(K, DIM) * DIM**-0.5, k, draw(H, DIM), decay, beta, step)


def results(kernel: Kernel, x: Inputs, lengths: tuple[int, ...], dout: torch.Tensor) -> list[torch.Tensor]:
    leaves = x.leaves()
    out = kernel.outputs(leaves, lengths)
    wanted = [one for name, one in leaves._asdict().items() if one is not None and name != "decay"]
    return [out.detach(), *torch.autograd.grad(out, wanted, dout)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["mamba", "fla"])
def test_a_kernel(name: str, rule: str) -> None:
    kernel = KERNELS[name]
    small = drawn(rule, LENGTH)
    if (stopped := refusal(kernel, Signature.of(small))) is not None:
        pytest.skip(f"{name} {stopped[1]}")
    torch.cuda.empty_cache()  # what torch keeps of the test before is free too
    if torch.cuda.mem_get_info()[0] < 120 * 2**30:
        pytest.skip("needs 120 GiB of GPU memory")
    x = drawn(rule, COUNT * LENGTH)
    dout = torch.randn_like(x.v)
    assert x.v.numel() > 2**31
    whole = results(kernel, x, (LENGTH,) * COUNT, dout)
    for first in (0, (COUNT - 1) * LENGTH):
        rows = slice(first, first + LENGTH)
        alone = results(
            kernel, Inputs(*(None if one is None else one[rows].clone() for one in x)), (LENGTH,), dout[rows]
        )
        for found, expected in zip(whole, alone, strict=True):
            error = (found[rows].float() - expected.float()).norm() / expected.float().norm()
            assert error <= 5e-3, (name, rule, first, float(error))


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution(bias: bool) -> None:
    channels, width = 8192, 4
    rows, end = 2**32 // channels + 4000, slice(-1000, None)
    x = torch.empty(rows, channels, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    weight = torch.randn(channels, width, dtype=torch.bfloat16, device="cuda")
    shift = torch.randn(channels, dtype=torch.bfloat16, device="cuda") if bias else None
    taps = choose_taps(TapsSignature("cuda", x.dtype, channels, width, bias, True))
    print("convolution by", taps.__name__)  # torch's, where causal-conv1d is not installed
    out = by_channels(taps, x, (rows - 1000, 1000), weight, shift, True)
    part = x.detach()[end].clone().requires_grad_()
    alone = by_channels(taps, part, (1000,), weight, shift, True)
    torch.testing.assert_close(out[end], alone, rtol=2e-2, atol=2e-2)
    dout = torch.randn_like(out)
    (dx,) = torch.autograd.grad(out, x, dout)
    (dpart,) = torch.autograd.grad(alone, part, dout[end])
    torch.testing.assert_close(dx[end], dpart, rtol=2e-2, atol=2e-2)
