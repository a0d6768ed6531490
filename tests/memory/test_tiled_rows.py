"""Modules in tiles of tokens: exact, nothing kept but the input, and no third forward pass beneath a checkpoint."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ringattn.memory.tiled_rows import TiledModule, tiled_rows

SIZE, INNER = 6, 22


class MLP(nn.Module):
    """A gated MLP that counts its calls."""

    def __init__(self, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = (nn.Linear(SIZE, INNER, bias=False, dtype=dtype) for _ in range(2))
        self.down = nn.Linear(INNER, SIZE, dtype=dtype)
        self.dropout = dropout
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(x.shape[-2])
        return self.down(F.dropout(F.silu(self.gate(x)) * self.up(x), self.dropout))


def gradients(function, x: Tensor, mlp: nn.Module) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = function(x)
    weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), (x, *mlp.parameters()))]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 45), st.sampled_from([(), (1,), (2,), (1, 3)]))
def test_any_tile_gives_what_one_call_gives(tokens, tile, before):
    mlp = MLP()
    x = torch.randn(*before, tokens, SIZE, dtype=torch.float64)
    wanted = gradients(mlp, x, mlp)
    mlp.rows.clear()
    found = gradients(lambda x: tiled_rows(mlp, x, list(mlp.parameters()), tile), x, mlp)
    assert max(mlp.rows) <= tile
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_nothing_is_kept_but_the_input():
    mlp, kept = MLP(), []
    tiled = TiledModule(mlp, 5)
    x = torch.randn(1, 23, SIZE, dtype=torch.float64, requires_grad=True)
    with saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        mlp(x * 2)
    assert kept == [torch.Size([1, 23, SIZE])]
    tiled.undo()
    assert "forward" not in mlp.__dict__


@pytest.mark.parametrize("reentrant", [False, True])
def test_beneath_a_checkpoint_the_layer_does_not_run_its_tiles_a_third_time(reentrant):
    mlp = MLP()
    x = torch.randn(1, 20, SIZE, dtype=torch.float64)
    wanted = gradients(lambda x: x + mlp(x.sin()), x, mlp)
    TiledModule(mlp, 5)
    mlp.rows.clear()
    found = checkpointed_gradients(mlp, x, reentrant)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    # Once forward and once in the backward pass; a reentrant checkpoint cannot stop early.
    assert mlp.rows == [5] * (8 if not reentrant else 12)


def checkpointed_gradients(mlp: nn.Module, x: Tensor, reentrant: bool) -> list[Tensor]:
    """As `gradients`; reentrant checkpoints work with `backward` only."""
    x = x.clone().requires_grad_()
    out = checkpoint(lambda x: x + mlp(x.sin()), x, use_reentrant=reentrant)
    weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape)
    (out * weights).sum().backward()
    assert x.grad is not None
    return [out, x.grad, *(p.grad for p in mlp.parameters() if p.grad is not None)]


def test_frozen_parameters_and_inputs_get_no_gradient():
    mlp = MLP()
    mlp.gate.requires_grad_(False)
    x = torch.randn(20, SIZE, dtype=torch.float64)
    wanted = torch.autograd.grad(mlp(x).sum(), mlp.up.weight)
    TiledModule(mlp, 7)
    found = torch.autograd.grad(mlp(x).sum(), mlp.up.weight)
    torch.testing.assert_close(found, wanted)
    mlp(x).sum().backward()
    assert mlp.gate.weight.grad is None
    with torch.no_grad():
        assert not mlp(x).requires_grad


def test_draws_are_repeated_in_the_backward_pass():
    mlp = MLP(dropout=0.5)
    TiledModule(mlp, 4)
    x = torch.randn(16, SIZE, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    out = mlp(x)
    after = torch.get_rng_state()
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(torch.get_rng_state(), after)
    moved = x.detach().clone()
    moved[5, 2] += 1e-6
    torch.manual_seed(3)
    slope = (mlp(moved).sum() - out.sum()) / 1e-6
    assert slope.item() == pytest.approx(gradient[5, 2].item(), rel=1e-4, abs=1e-6)


def test_more_tiles_lose_no_precision_in_the_gradients_of_parameters():
    exact = MLP(torch.float64)
    rounded = MLP(torch.float64).bfloat16()
    exact.load_state_dict({name: value.double() for name, value in rounded.state_dict().items()})
    x = torch.randn(2048, SIZE).bfloat16()

    def error(tile: int) -> float:
        right = torch.autograd.grad(exact(x.double()).square().mean(), exact.up.weight)[0]
        out = tiled_rows(rounded, x, list(rounded.parameters()), tile)
        found = torch.autograd.grad(out.double().square().mean(), rounded.up.weight)[0]
        return float((found.double() - right).norm() / right.norm())

    assert error(4) <= 1.1 * error(2047)


def test_autocast_of_the_forward_pass_counts_in_the_backward_pass():
    mlp = MLP(torch.float32)
    dtypes = []
    mlp.down.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    TiledModule(mlp, 10)
    with torch.autocast("cpu", torch.bfloat16):
        out = mlp(torch.randn(20, SIZE, requires_grad=True))
    out.float().sum().backward()
    assert dtypes == [torch.bfloat16] * 4


class Counted(MLP):
    """An MLP whose end varies."""

    end = "plain"

    def forward(self, x: Tensor) -> Tensor:
        inner = F.dropout(F.silu(self.gate(x)) * self.up(x), self.dropout)
        out = self.down(inner)
        if self.end == "in place":
            out *= self.down.bias
        elif self.end == "other layer":
            out = out + self.gate(x)[..., :SIZE]
        elif self.end == "read":
            out = self.down(out[..., :1] * inner)
        elif self.end == "varies":
            out = out * 2 if (x.sum() > 0) else out
        return out


@pytest.mark.parametrize("end", ["plain", "in place", "other layer", "read", "varies"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_last_layer_that_is_not_computed_again_changes_no_gradient(end, dropout):
    """Also where its output is changed, read, or not what the module returns, in some tiles or in all."""
    mlp = Counted(dropout=dropout)
    mlp.end = end
    x = torch.randn(1, 24, SIZE, dtype=torch.float64)

    def each_tile(x: Tensor) -> Tensor:
        return torch.cat([mlp(part) for part in x.split(5, 1)], 1)

    torch.manual_seed(4)
    wanted = gradients(each_tile, x, mlp)
    TiledModule(mlp, 5)
    torch.manual_seed(4)
    found = gradients(mlp, x, mlp)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_the_last_layer_is_not_computed_again():
    mlp = MLP()
    TiledModule(mlp, 5)
    x = torch.randn(1, 20, SIZE, dtype=torch.float64, requires_grad=True)
    out = mlp(x)
    calls = []
    plain = F.linear
    try:
        F.linear = lambda *args: calls.append(1) or plain(*args)
        out.sum().backward()
    finally:
        F.linear = plain
    assert len(calls) == 2 * 4  # gate and up of four tiles


@pytest.mark.parametrize("tile", [0, -1, 2.5, True])
def test_a_tile_is_a_number_of_tokens(tile):
    with pytest.raises(ValueError, match=f"tile must be a number of tokens >= 1, got {tile}"):
        TiledModule(MLP(), tile)


class Routed(nn.Module):
    """As mixtures of experts: rows, and scores of a router without the first dimension and in another dtype."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.up = (nn.Linear(SIZE, SIZE, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(x.reshape(-1, SIZE)).softmax(-1)
        return self.up(x) * scores.view_as(x), scores[:, :2].float()


@pytest.mark.parametrize("tile", [3, 20])
@pytest.mark.parametrize("used", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_several_tensors_are_put_together_again(tile, used):
    def of(module: nn.Module, x: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
        out, scores = module(x)
        loss = used[0] * out.square().sum() + used[1] * scores.double().square().sum()
        return (out, scores), torch.autograd.grad(loss, (x, *module.parameters()))

    x = torch.randn(1, 13, SIZE, dtype=torch.float64, requires_grad=True)
    module = Routed()
    wanted = of(module, x)
    tiled = TiledModule(module, tile)
    found = of(module, x)
    for one, other in zip((*found[0], *found[1]), (*wanted[0], *wanted[1]), strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        assert [one.shape for one in module(x)] == [(1, 13, SIZE), (13, 2)]
    with pytest.raises(NotImplementedError, match="must return tensors with a row for each of"):
        module(x.expand(2, 13, SIZE))  # scores of two rows of tokens would be told apart no more
    tiled.undo()


def test_what_is_not_one_row_a_token_is_refused():
    class Wrong(nn.Module):
        def __init__(self, out) -> None:
            super().__init__()
            self.out = out

        def forward(self, x: Tensor):
            return self.out(x)

    for out, told in (
        (lambda x: (x, x.sum()), "tuple"),
        (lambda x: (x, x.long()), "tuple"),
        (lambda x: x[:1], r"\(1, 4\)"),
        (lambda x: [x, x], "list"),
        (lambda x: (), "tuple"),
    ):
        wrong = Wrong(out)
        TiledModule(wrong, 2)
        with pytest.raises(NotImplementedError, match=rf"a tiled Wrong must return tensors .* got {told}"):
            wrong(torch.zeros(3, 4))
    mlp = MLP()
    TiledModule(mlp, 2)
    with pytest.raises(NotImplementedError, match="a tiled MLP takes one tensor and nothing else, got also residual"):
        mlp(torch.zeros(3, SIZE), residual=1)


def test_weights_that_deepspeed_holds_elsewhere_are_noticed():
    mlp = MLP()
    TiledModule(mlp, 2)
    mlp.up.weight.ds_id, mlp.up.weight.data = 1, torch.empty(0, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"a tiled MLP has no weights here: .* before deepspeed\.initialize"):
        mlp(torch.zeros(3, SIZE, dtype=torch.float64))
