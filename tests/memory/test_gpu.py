"""Memory features on a GPU: precision in bf16, what is alive, and copies beside kernels."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ringattn.memory.offload import Offload
from ringattn.memory.tiled_loss import tiled_loss
from ringattn.memory.tiled_rows import TiledModule

pytestmark = pytest.mark.gpu
MIB = 2**20


def peak_of(function) -> int:
    """Bytes that a call allocates at most, beside what is there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_a_thousand_tiles_are_as_exact_as_one():
    """bf16 inputs; the judge is float64 of the same inputs."""
    torch.manual_seed(0)
    tokens, size, words = 8192, 512, 8192
    hidden = torch.randn(tokens, size, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(words, size, device="cuda", dtype=torch.bfloat16) / size**0.5
    targets = torch.randint(0, words, (tokens,), device="cuda")
    targets[::7] = -100

    def errors(tile: int) -> list[float]:
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = tiled_loss(x, w, targets, tile=tile)
        loss.backward()
        found = loss.detach(), x.grad, w.grad
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, right, strict=True)]

    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss = F.cross_entropy(x @ w.T, targets, reduction="sum")
    loss.backward()
    right = loss.detach(), x.grad, w.grad
    one, many = errors(tokens), errors(8)
    print("errors of loss, dx, dW: one tile", one, "1,024 tiles", many)
    for single, tiles in zip(one, many, strict=True):
        assert tiles <= 1.1 * single + 1e-7


def test_with_the_number_of_targets_nothing_waits():
    hidden = torch.randn(4096, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 1000, (4096,), device="cuda")
    targets[::3] = -100
    count = int((targets != -100).sum())
    wanted = torch.autograd.grad(tiled_loss(hidden, weight, targets, tile=512), (hidden, weight))
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = torch.autograd.grad(tiled_loss(hidden, weight, targets, tile=512, count=count), (hidden, weight))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, found, wanted))


def test_logits_of_one_tile_are_alive():
    tokens, size, words = 16384, 256, 65536
    hidden = torch.randn(tokens, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(words, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, words, (tokens,), device="cuda")
    tile = 1024
    logits = tile * words * 4
    peak = peak_of(lambda: tiled_loss(hidden, weight, targets, tile=tile).backward())
    gradients = hidden.numel() * 2 + weight.numel() * (4 + 2)
    assert peak <= gradients + 2.6 * logits  # logits, their log-softmax, and its gradient in bf16


class MLP(nn.Module):
    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(size, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def test_inner_rows_of_one_tile_are_alive():
    torch.manual_seed(0)
    mlp = MLP(512, 8192).to("cuda", torch.bfloat16)
    x = torch.randn(1, 32768, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    plain = mlp(x)
    wanted = torch.autograd.grad(plain.float().square().mean(), (x, *mlp.parameters()))
    del plain
    TiledModule(mlp, 2048)
    found = torch.autograd.grad(mlp(x).float().square().mean(), (x, *mlp.parameters()))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 5e-3 * other.norm()
    inner = 2048 * 8192 * 2
    grads = sum(p.numel() for p in mlp.parameters()) * 6 + 6 * x.numel() * 2
    assert peak_of(lambda: mlp(x).sum().backward()) <= grads + 8 * inner


def test_kept_tensors_wait_on_the_host_and_come_back_in_time():
    torch.manual_seed(0)
    layers = nn.ModuleList(MLP(1024, 2048) for _ in range(8)).to("cuda", torch.bfloat16)
    x = torch.randn(1, 65536, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    one = x.numel() * 2
    offload = Offload(torch.device("cuda", torch.cuda.current_device()), 8 * one)

    def run(away: int | None) -> list[Tensor]:
        h = x * 1
        for number, layer in enumerate(layers):
            if away is None:
                h = h + checkpoint(layer, h, use_reentrant=False)
            else:
                with offload.saving(away=number < away):
                    h = h + checkpoint(layer, h, use_reentrant=False)
        return list(torch.autograd.grad(h.float().square().mean(), (x, *layers.parameters())))

    wanted = run(None)
    for away in (0, 5, 7):
        for found, right in zip(run(away), wanted, strict=True):
            assert torch.equal(found, right)
    del found, right
    plain, less = peak_of(lambda: run(None)), peak_of(lambda: run(7))
    print(f"peak {plain / one:.1f} tensors, with 7 of 8 on the host {less / one:.1f}")
    assert less <= plain - 3 * one
    assert offload.stack.top == 0
    assert offload.stack.most == 7 * one
    offload.close()


def test_a_graph_that_is_dropped_while_tensors_travel_harms_nothing():
    """Memory that a copy still writes to must not be handed to a kernel."""
    offload = Offload(torch.device("cuda", torch.cuda.current_device()), 2**30)
    x = torch.ones(64 * MIB // 4, device="cuda", requires_grad=True)
    for _ in range(20):
        with offload.saving():
            a = (x * 2).exp()
            b = a.exp().sin()
        kept = [ref() for ref in offload._order]
        offload._bring(kept[0])
        offload._bring(kept[1])
        del a, b, kept
        fresh = torch.full_like(x, 3.0)
        other = torch.full_like(x, 3.0)
        torch.cuda.synchronize()
        assert all(bool((one == 3).all()) for one in (fresh, other))
    assert offload.stack.top == 0
    offload.close()
