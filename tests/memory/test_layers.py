"""Layers that keep their input, or their attention too, here or on the host: the same gradients, attention once."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ringattn import Documents, init_mesh
from ringattn.hf import parallelize, shard_batch
from ringattn.memory.layers import keep_layers
from ringattn.memory.offload import Offload
from ringattn.memory.tiled_rows import TiledModule
from ringattn.parallel.execution import executor
from tests.pool import Pools

LENGTHS = [30, 1, 17]
# keep, layers away, every
WAYS: dict[str, tuple[Any, int, int]] = {
    "layer": ("layer", 0, 1),
    "attention": ("attention", 0, 1),
    "selective": ("selective", 0, 1),
    "layer, away": ("layer", 3, 1),
    "attention, two away": ("attention", 2, 1),
    "selective, two away": ("selective", 2, 1),
    "layer, every second": ("layer", 0, 2),
    "attention, every second": ("attention", 0, 2),
    "attention, the first of all, one away": ("attention", 1, 3),
}


def tiny() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def gradients(model: nn.Module, mesh: Any) -> tuple[list[Tensor], int]:
    """Loss and gradients of all parameters, averaged over ranks, and how often forward stages were walked."""
    ids = torch.arange(sum(LENGTHS))[None] * 7 % 61
    batch = shard_batch({"input_ids": ids, "labels": ids}, Documents(LENGTHS), mesh)
    walked = executor.forward_stages
    with mock.patch.object(executor, "forward_stages", mock.Mock(side_effect=walked)) as counted:
        loss = model(**batch).loss
        found = list(torch.autograd.grad(loss, list(model.parameters())))
    for grad in found:
        dist.all_reduce(grad)
    return [loss.detach(), *found], counted.call_count


def compared(ring: int, ulysses: int) -> list[tuple[str, float, int]]:
    """For each way: the largest difference from the plain model, and how often a layer computed its attention."""
    mesh = init_mesh(ring=ring, ulysses=ulysses)
    model = tiny()
    parallelize(model, mesh)
    wanted, once = gradients(model, mesh)
    layers: Any = model.model.layers
    offload = Offload(torch.device("cpu"), 2**22, least=1)
    out = []
    for tiled in (False, True):
        mlps = [TiledModule(layer.mlp, 7) for layer in layers] if tiled else []
        for name, (keep, away, every) in WAYS.items():
            kept = keep_layers(layers, keep, offload if away else None, away, every)
            found, count = gradients(model, mesh)
            kept.undo()
            worst = max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))
            out.append((name, worst, count // (once // 3)))
        for mlp in mlps:
            mlp.undo()
    found, count = gradients(model, mesh)
    out.append(("undone", max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)), 3))
    assert offload.stack.top == 0
    return out


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 1), (2, 1), (1, 2)])
def test_a_model_gets_the_gradients_that_it_had(pool: Pools, ring: int, ulysses: int) -> None:
    for rank in pool(ring * ulysses).run(compared, ring, ulysses):
        for name, worst, walks in rank:
            assert worst <= 1e-12, name
            # with every=2 the first of three layers is computed twice more, since the second's input comes from it
            assert walks == ({1: 6, 2: 7}[WAYS[name][2]] if name.startswith("layer") else 3), name


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.calls += 1
        return self.inner(x).tanh() * scale


def test_without_gradients_a_layer_runs_as_ever() -> None:
    layer = Counted()
    keep_layers([layer], "attention")
    with torch.no_grad():
        layer(torch.zeros(2, 4), scale=2.0)
    assert layer.calls == 1
    layer(torch.zeros(2, 4), scale=2.0).sum().backward()
    assert layer.calls == 3


def test_names_and_types_stay() -> None:
    layers = nn.ModuleList(Counted() for _ in range(2))
    before = list(layers.state_dict())
    kept = keep_layers(layers, "layer")
    assert list(layers.state_dict()) == before
    assert type(layers[0]) is Counted
    kept.undo()
    assert all("forward" not in layer.__dict__ for layer in layers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("everything",), "keep must be one of layer, attention, selective, got 'everything'"),
        (("layer", None, 3), "away must be a number of the 2 layers, got 3"),
        (("layer", None, 1), "away=1 layers need an offload"),
        (("layer", None, 0, 0), "every must be a number of layers >= 1, got 0"),
        (("selective", None, 0, 2), 'every=2 needs keep="layer" or "attention", got keep=\'selective\''),
    ],
)
def test_what_cannot_be_is_refused_by_name(arguments: tuple[Any, ...], message: str) -> None:
    layers = [Counted(), Counted()]
    with pytest.raises(ValueError, match=message):
        keep_layers(layers, *arguments)
    layers[1].gradient_checkpointing = True
    with pytest.raises(ValueError, match="Counted checkpoints itself already"):
        keep_layers(layers, "layer")
    assert "forward" not in layers[0].__dict__
    keep_layers(layers[:1], "layer")
    with pytest.raises(ValueError, match="keeps what it should already"):
        keep_layers(layers[:1], "layer")
