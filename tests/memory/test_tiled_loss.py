"""The tiled loss against the plain one, in float64, and what becomes of its precision with the number of tiles."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ringattn.memory.picks import IGNORE_INDEX
from ringattn.memory.tiled_loss import tiled_loss

HIDDEN, WORDS = 12, 29


def softcap(x: Tensor) -> Tensor:
    return 3 * torch.tanh(x / 3)


def inputs(tokens: int, share: float, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Hidden states, weight, bias and targets, of which about a share is no target."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(WORDS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(WORDS, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, WORDS, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < share] = IGNORE_INDEX
    return hidden, weight, bias, targets


def plain_loss(hidden, weight, targets, bias=None, transform=None, z_loss=0.0, scale=1.0) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    logits = logits if transform is None else transform(logits)
    counted = targets != IGNORE_INDEX
    log_sums = logits.logsumexp(1)
    picked = logits.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    return ((log_sums - picked + z_loss * log_sums**2) * counted).sum() * scale


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 40),
    tile=st.integers(1, 50),
    share=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 5),
    transform=st.sampled_from([None, softcap, lambda x: x * 0.25]),
    z_loss=st.sampled_from([0.0, 0.01]),
    with_bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.125]),
    counted=st.booleans(),
)
def test_loss_and_gradients_are_those_of_all_logits_at_once(
    tokens, tile, share, seed, transform, z_loss, with_bias, scale, counted
):
    *parameters, targets = inputs(tokens, share, seed)
    hidden, weight, bias = parameters
    kwargs = {"bias": bias if with_bias else None, "transform": transform, "z_loss": z_loss, "scale": scale}
    wanted = plain_loss(hidden, weight, targets, **kwargs)
    count = int((targets != IGNORE_INDEX).sum()) if counted else None
    found = tiled_loss(hidden, weight, targets, tile=tile, count=count, **kwargs)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    of = parameters if with_bias else parameters[:2]
    for one, other in zip(torch.autograd.grad(found * 1.7, of), torch.autograd.grad(wanted * 1.7, of), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_only_the_gradients_that_are_wanted_are_made():
    hidden, weight, _, targets = inputs(20, 0.3)
    weight = weight.detach()
    (wanted,) = torch.autograd.grad(plain_loss(hidden, weight, targets), hidden)
    (found,) = torch.autograd.grad(tiled_loss(hidden, weight, targets, tile=7), hidden)
    torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        assert not tiled_loss(hidden, weight, targets).requires_grad


class Waits(TorchDispatchMode):
    """Notes operators whose results have as many rows as the device finds, or are read by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_with_the_number_of_targets_nothing_waits(monkeypatch):
    hidden, weight, _, targets = inputs(40, 0.5)
    count = int((targets != IGNORE_INDEX).sum())
    assert 0 < count < 40
    # What is checked at once here is left to the device on a GPU.
    monkeypatch.setattr("ringattn.memory.tiled_loss._checked", lambda count, targets: count)
    for known, expected in ((None, ["aten.nonzero.default"]), (count, [])):
        with Waits() as waits:
            tiled_loss(hidden, weight, targets, tile=7, count=known).backward()
        assert waits.found == expected


@pytest.mark.parametrize("off", [-1, 1])
def test_a_wrong_number_of_targets_is_refused(off):
    hidden, weight, _, targets = inputs(40, 0.5)
    count = int((targets != IGNORE_INDEX).sum())
    with pytest.raises(ValueError, match=rf"the number of targets that are not -100, {count}, got {count + off}"):
        tiled_loss(hidden, weight, targets, count=count + off)
    for wrong in (41, -1, 1.0, True):
        with pytest.raises(ValueError, match="count must be a number of the 40 targets, got"):
            tiled_loss(hidden, weight, targets, count=wrong)


def test_a_weight_used_as_embedding_too_gets_both_gradients():
    _, weight, _, targets = inputs(20, 0.3)
    ids = torch.arange(20) % WORDS
    (wanted,) = torch.autograd.grad(plain_loss(weight[ids], weight, targets), weight)
    (found,) = torch.autograd.grad(tiled_loss(weight[ids], weight, targets, tile=6), weight)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_more_tiles_are_no_less_exact(dtype):
    """Errors of loss and gradients against float64 of the same rounded inputs, with one tile and with one a token."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 64, generator=generator).to(dtype)
    weight = (torch.randn(256, 64, generator=generator) / 8).to(dtype)
    targets = torch.randint(0, 256, (512,), generator=generator)

    def of(tile: int | None) -> tuple[Tensor, ...]:
        own = torch.float64 if tile is None else dtype
        x, w = hidden.to(own).requires_grad_(), weight.to(own).requires_grad_()
        loss = plain_loss(x, w, targets) if tile is None else tiled_loss(x, w, targets, tile=tile)
        return loss, *torch.autograd.grad(loss, (x, w))

    right, one, many = of(None), of(512), of(1)
    for exact, single, tiles in zip(right, one, many, strict=True):
        error = [(x.double() - exact).norm() / exact.norm() for x in (single, tiles)]
        assert error[1] <= 1.1 * error[0] + 1e-7


def test_half_precision_gradients_of_a_mean_do_not_vanish():
    """One over a million targets is below what float16 can hold; the loss is scaled up before the backward pass."""
    hidden, weight, _, targets = inputs(20, 0.0, dtype=torch.float16)
    loss = tiled_loss(hidden, weight, targets, scale=2.0**-24)
    (found,) = torch.autograd.grad(loss * 2.0**24, hidden)
    (wanted,) = torch.autograd.grad(tiled_loss(hidden, weight, targets), hidden)
    assert torch.equal(found, wanted)
    assert found.abs().max() > 0.01


def test_autocast_casts_as_a_linear_layer_does():
    hidden, weight, _, targets = inputs(20, 0.3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = tiled_loss(hidden, weight, targets)
    rounded = tiled_loss(hidden.bfloat16(), weight.bfloat16(), targets)
    assert torch.equal(found, rounded)
    assert not torch.equal(found, tiled_loss(hidden, weight, targets))
    assert torch.autograd.grad(found, weight)[0].dtype == torch.float32


def test_no_more_than_a_tile_of_logits_is_alive():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dim() == 2 and out.shape[1] == WORDS and out.shape[0] != HIDDEN:
                self.rows = max(self.rows, out.shape[0])
            return out

    hidden, weight, _, targets = inputs(40, 0.3)
    with Largest() as largest:
        tiled_loss(hidden, weight, targets, tile=7, transform=softcap).backward()
    assert largest.rows == 7


def test_a_second_backward_pass_is_refused():
    hidden, weight, _, targets = inputs(20, 0.3)
    loss = tiled_loss(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="retain_graph is of no use"):
        loss.backward()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tile": 0}, "tile must be a number of tokens >= 1, got 0"),
        ({"tile": 2.0}, "tile must be a number of tokens >= 1, got 2.0"),
        ({"weight": torch.zeros(WORDS, HIDDEN + 1)}, r"weight \(V, E\), got \(20, 12\) and \(29, 13\)"),
        ({"weight": torch.zeros(WORDS, HIDDEN)}, "one dtype, got torch.float64 and torch.float32"),
        ({"targets": torch.zeros(19, dtype=torch.long)}, r"targets must be 20 integers.*got \(19,\)"),
        ({"bias": torch.zeros(3)}, r"bias must be \(29,\)"),
    ],
)
def test_what_does_not_fit_is_named(changed, message):
    hidden, weight, _, targets = inputs(20, 0.3)
    with pytest.raises(ValueError, match=message):
        tiled_loss(**({"hidden": hidden, "weight": weight, "targets": targets} | changed))
