"""Products that are kept: each is computed once, those that are not worth it twice, and every gradient is the same."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ringattn.memory.layers import keep_layers
from ringattn.memory.offload import Offload
from ringattn.memory.products import narrow
from ringattn.memory.tiled_rows import TiledModule
from tests.pool import Pools

SIZE = 8


class Layer(nn.Module):
    """A transformer's layer with something cheap in the place of attention.

    Arguments:
        end: "added": the MLP's output is only added; "normed": it goes through a norm first.
    """

    def __init__(self, end: str = "added", bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        double: dict[str, Any] = {"dtype": torch.float64}
        self.q, self.k, self.o = (nn.Linear(SIZE, SIZE, bias=bias, **double) for _ in range(3))
        self.mlp = MLP(bias)
        self.norms = nn.ModuleList(nn.LayerNorm(SIZE, **double) for _ in range(3 if end == "normed" else 2))
        self.end, self.in_place = end, False

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        q = self.q(h)
        if self.in_place:
            q.mul_(1.5)
        x = x + self.o((q * self.k(h)).tanh())
        out = self.mlp(self.norms[1](x))
        return x + (self.norms[2](out) if self.end == "normed" else out)


class MLP(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(SIZE, 5 * SIZE, bias=bias, dtype=torch.float64) for _ in range(2))
        self.down = nn.Linear(5 * SIZE, SIZE, bias=bias, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(h)) * self.up(h))


@contextmanager
def counted(layer: nn.Module) -> Iterator[Counter[str]]:
    """How often a product with each weight was computed, in a forward pass."""
    names = {id(parameter): name.split(".")[-2] for name, parameter in layer.named_parameters()}
    calls: Counter[str] = Counter()
    plain = F.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        # Until torch's own checkpoint stops, which is before a product that it does not need.
        out = plain(x, weight, bias)
        calls[names[id(weight)]] += 1
        return out

    with mock.patch.object(F, "linear", linear), mock.patch("ringattn.memory.products.F.linear", linear):
        yield calls


def gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    found = torch.autograd.grad(out.sin().sum(), (x, *parameters))
    return [out.detach(), *found]


def rows() -> Tensor:
    return torch.randn(1, 24, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("end", ["added", "normed"])
@pytest.mark.parametrize("away", [False, True])
def test_narrow_products_are_computed_once(end: str, bias: bool, away: bool) -> None:
    layer = Layer(end, bias)
    wanted = gradients(layer, rows())
    offload = Offload(torch.device("cpu"), 2**20, least=1) if away else None
    kept = keep_layers([layer], "selective", offload, int(away))
    for step in range(3):
        with counted(layer) as calls:
            found = gradients(layer, rows())
        assert_same(found, wanted)
        twice = {name for name, count in calls.items() if count == 2}
        # Down is the last one: if it is only added to the rest, the backward pass needs nothing of it. That is found
        # out in the first step, where it is computed again since it was not kept.
        assert twice == ({"gate", "up"} if step or end == "normed" else {"gate", "up", "down"}), step
        assert set(calls.values()) <= {1, 2}
    kept.undo()
    assert not [one for one in layer.modules() if "forward" in one.__dict__]
    assert offload is None or offload.stack.top == 0


def sizes_away(end: str) -> int:
    layer, offload = Layer(end), Offload(torch.device("cpu"), 2**20, least=1)
    keep_layers([layer], "selective", offload, 1)
    layer(rows().requires_grad_())
    return offload.stack.most // (24 * SIZE * 8)


def test_what_is_not_read_is_never_kept() -> None:
    assert sizes_away("normed") == 5  # input, q, k, o, down
    assert sizes_away("added") == 4


def test_wide_products_are_computed_again() -> None:
    layer = Layer()
    assert narrow(layer) == [layer.q, layer.k, layer.o, layer.mlp.down]


@pytest.mark.parametrize("end", ["added", "normed"])
def test_tiles_keep_nothing_of_their_own(end: str) -> None:
    layer = Layer(end)
    wanted = gradients(layer, rows())
    TiledModule(layer.mlp, 7)
    offload = Offload(torch.device("cpu"), 2**20, least=1)
    keep_layers([layer], "selective", offload, 1)
    for _ in range(2):
        with counted(layer) as calls:
            assert_same(gradients(layer, rows()), wanted)
        assert [calls[name] for name in "qko"] == [1, 1, 1]
        assert calls["down"] == (4 if end == "added" else 8)  # not for gradients alone
    assert offload.stack.most // (24 * SIZE * 8) == 4  # input, q, k, o


@pytest.mark.parametrize("away", [False, True])
def test_a_product_that_is_changed_in_place_is_computed_again(away: bool) -> None:
    layer = Layer()
    layer.in_place = True
    wanted = gradients(layer, rows())
    offload = Offload(torch.device("cpu"), 2**20, least=1) if away else None
    keep_layers([layer], "selective", offload, int(away))
    for _ in range(2):
        with counted(layer) as calls:
            assert_same(gradients(layer, rows()), wanted)
        assert calls["q"] == 2
        assert calls["k"] == 1


def test_a_retained_graph_takes_them_twice() -> None:
    layer = Layer()
    keep_layers([layer], "selective")
    x = rows().requires_grad_()
    out = layer(x).sin().sum()
    first, second = (torch.autograd.grad(out, x, retain_graph=again)[0] for again in (True, False))
    assert torch.equal(first, second)


def test_a_checkpoint_around_the_layer_changes_no_gradient() -> None:
    layer = Layer()
    wanted = gradients(layer, rows())
    keep_layers([layer], "selective")
    outer = nn.ModuleList([layer])
    outer.forward = lambda x: checkpoint(layer, x, use_reentrant=False)  # type: ignore[method-assign]
    for _ in range(2):
        assert_same(gradients(outer, rows()), wanted)


def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    layer = Layer()
    for frozen in (layer.q, layer.mlp.down, layer.mlp.gate):
        frozen.requires_grad_(False)
    wanted = torch.autograd.grad(layer(rows()).sin().sum(), (layer.k.weight, layer.mlp.up.weight))
    keep_layers([layer], "selective")
    for _ in range(2):
        found = torch.autograd.grad(layer(rows()).sin().sum(), (layer.k.weight, layer.mlp.up.weight))
        torch.testing.assert_close(found, wanted)
    layer(rows()).sum().backward()
    assert layer.q.weight.grad is None


def test_autocast_of_the_forward_pass_counts_in_the_backward_pass() -> None:
    def found(layer: nn.Module) -> list[Tensor]:
        x = rows().float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        return [out.detach(), *torch.autograd.grad(out.float().sin().sum(), (x, *layer.parameters()))]

    layer = Layer().float()
    wanted = found(layer)
    keep_layers([layer], "selective")
    for _ in range(2):
        for one, other in zip(found(layer), wanted, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_another_product_than_there_was_is_noticed() -> None:
    layer, turns = Layer(), iter([0, 1])
    plain = layer.forward

    def varying(x: Tensor) -> Tensor:
        return plain(x) if next(turns) == 0 else layer.o(x) + plain(x)

    layer.forward = varying  # type: ignore[method-assign]
    keep_layers([layer], "selective")
    with pytest.raises(RuntimeError, match="linear layer 1 of a layer is another one where the layer is comp"):
        layer(rows().requires_grad_()).sum().backward()


def families() -> list[tuple[str, float]]:
    """The largest difference from the plain model by family, whose layers differ in norms and in what follows them."""
    from ringattn.hf.tiny import read_config, tiny_config, tiny_model
    from tests.hf.families import GQA

    out = []
    for family in ("llama", "qwen3", "gemma3_text", "gemma4_text", "cohere2"):
        model = tiny_model(tiny_config(read_config(family), **GQA)).double().train()
        ids = torch.arange(40)[None] * 7 % 97

        def found(model: Any = model, ids: Tensor = ids) -> list[Tensor]:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

        wanted = found()
        for keep, every in (("selective", 1), ("layer", 2)):
            kept = keep_layers(model.model.layers, keep, every=every)
            for _ in range(2):
                worst = max(float((a - b).abs().max()) for a, b in zip(found(), wanted, strict=True))
                out.append((f"{family} {keep}", worst))
            kept.undo()
    return out


def test_families_get_the_gradients_that_they_had(pool: Pools) -> None:
    pytest.importorskip("transformers")
    for family, worst in pool(1).run(families)[0]:
        assert worst <= 1e-12, family
