"""What layers keep, and what is said when memory runs out, on a GPU."""

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ringattn.memory.layers import keep_layers
from ringattn.memory.offload import Offload
from ringattn.memory.out_of_memory import CudaMemory, MemoryWatch
from tests.memory.test_gpu import MLP, peak_of

pytestmark = pytest.mark.gpu
LAYERS = 8


class Layer(nn.Module):
    """Products that are kept, products that are not, and a norm between them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(size, size, bias=False) for _ in range(2))
        self.norm, self.mlp = nn.RMSNorm(size), MLP(size, 4 * size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.second(self.first(x).tanh())
        return x + self.mlp(self.norm(x))


def run(layers: nn.ModuleList, x: Tensor) -> list[Tensor]:
    h = x * 1
    for layer in layers:
        h = layer(h)
    return list(torch.autograd.grad(h.float().square().mean(), (x, *layers.parameters())))


@pytest.mark.parametrize("away", [0, 5])
@pytest.mark.parametrize(("keep", "every"), [("selective", 1), ("layer", 3)])
def test_gradients_are_as_good_wherever_inputs_wait(keep: str, every: int, away: int) -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(Layer(1024) for _ in range(LAYERS)).to("cuda", torch.bfloat16)
    x = torch.randn(1, 16384, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    plain = run(layers, x)
    exact = nn.ModuleList(Layer(1024) for _ in range(LAYERS)).to("cuda", torch.float64)
    exact.load_state_dict({name: value.double() for name, value in layers.state_dict().items()})
    right = run(exact, x.detach().double().requires_grad_())
    offload = Offload(torch.device("cuda", torch.cuda.current_device()), 2**31)
    keep_layers(layers, keep, offload if away else None, away, every)  # type: ignore[arg-type]
    for _ in range(2):
        for one, other, truth in zip(run(layers, x), plain, right, strict=True):
            assert (one.double() - truth).norm() <= 1.05 * (other.double() - truth).norm() + 1e-6 * truth.norm()
    assert offload.stack.top == 0
    offload.close()


def test_every_fourth_input_takes_less() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(Layer(256) for _ in range(16)).to("cuda", torch.bfloat16)
    x = torch.randn(1, 65536, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    one = x.numel() * 2
    peaks = {}
    for every in (1, 4):
        kept = keep_layers(layers, "layer", every=every)
        run(layers, x)
        peaks[every] = peak_of(lambda: run(layers, x))
        kept.undo()
    print({every: f"{peak / one:.1f} inputs" for every, peak in peaks.items()})
    assert peaks[4] <= peaks[1] - 8 * one  # 16 inputs, or 4 and 3 more


def test_a_full_gpu_is_reported(tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    watch = MemoryWatch(CudaMemory(device), tmp_path)
    held = torch.empty(2**30, dtype=torch.uint8, device=device)
    with pytest.raises(torch.OutOfMemoryError) as caught, watch.step(3) as at:  # noqa: PT012  who asks is part of it
        at("forward pass")
        torch.empty(2**45, dtype=torch.uint8, device=device)
    said = str(caught.value)
    print(said)
    assert said.startswith(
        "step 3 on rank 0, in its forward pass: the GPU's memory is full, 32768.00 GiB more were wanted"
    )
    assert "are in use by tensors" in said
    assert "1.00 GiB in 1 of 1.00 GiB" in said
    snapshot = pickle.loads((tmp_path / "out-of-memory-step3-rank0.pickle").read_bytes())
    assert any(block["size"] == held.numel() for segment in snapshot["segments"] for block in segment["blocks"])
