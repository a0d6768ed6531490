"""Attention that is kept beneath a checkpoint: computed once, and every gradient the same."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ringattn import Documents, Layout, Mask, ParallelAttention, init_mesh
from ringattn.memory.offload import Offload
from ringattn.parallel.execution import executor
from ringattn.parallel.execution.recall import Recall
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

DOCS = Documents([37, 3, 0, 20, 11], total=75)
SIZE, HEADS, DIM = 12, 4, 6


class Layer(nn.Module):
    """A layer with two attentions, so that their order counts."""

    def __init__(self, mesh: Any, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(SIZE, (HEADS + 4) * DIM, dtype=torch.float64)
        self.end = nn.Linear(HEADS * DIM, SIZE, dtype=torch.float64)
        sinks = nn.Parameter(torch.randn(HEADS, dtype=torch.float64))
        masks = Mask(), Mask(window=(5, 0))
        self.first, self.second = (ParallelAttention(mesh, mask, sinks=sinks, **options) for mask in masks)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        for attention in (self.first, self.second):
            q, k, v = self.project(x).view(len(x), -1, DIM).split((HEADS, 2, 2), 1)
            x = x + self.end(attention(q, k, v, layout).flatten(1)).tanh()
        return x


def gradients(layers: nn.ModuleList, layout: Layout, how: str) -> tuple[list[Tensor], int]:
    """Output and gradients, and how often stages of a forward pass were walked."""
    generator = torch.Generator().manual_seed(1)
    x = layout.shard(torch.randn(DOCS.total, SIZE, dtype=torch.float64, generator=generator)).requires_grad_()
    offload = Offload(torch.device("cpu"), 2**20, least=1)
    h, walked = x, executor.forward_stages
    with mock.patch.object(executor, "forward_stages", mock.Mock(side_effect=walked)) as counted:
        for layer in layers:
            if how == "plain":
                h = layer(h, layout)
            elif how == "layer":
                h = checkpoint(layer, h, layout, use_reentrant=False)
            else:
                recall = Recall(offload.pack, offload.unpack) if how == "offloaded" else Recall()
                h = checkpoint(layer, h, layout, use_reentrant=False, context_fn=recall.contexts)
        found = torch.autograd.grad(h.square().sum(), (x, *layers.parameters()))
    return [h.detach(), *found], counted.call_count


def compared(ring: int, ulysses: int, options: dict[str, Any]) -> list[tuple[str, float, int, int]]:
    """For each way: the largest difference from the plain one, walks, and walks of the plain one."""
    mesh = init_mesh(sequence=ring * ulysses) if "parts" in options else mesh_of(ring, ulysses)
    options = dict(options)
    layout = Layout(DOCS, mesh, parts=options.pop("parts", None))
    layers = nn.ModuleList(Layer(mesh, backend="reference", **options) for _ in range(3))
    wanted, once = gradients(layers, layout, "plain")
    out = []
    for how in ("layer", "kept", "offloaded"):
        found, count = gradients(layers, layout, how)
        worst = max(float((a - b).abs().max()) if a.numel() else 0.0 for a, b in zip(found, wanted, strict=True))
        out.append((how, worst, count, once))
    return out


PARTS = {"parts": [((1, 2), [0, 4]), ((2, 1), [1, 2, 3])]}
CASES: list[tuple[int, int, dict[str, Any]]] = [
    (1, 1, {}),
    (2, 1, {"scheme": "gather"}),
    (2, 1, {"scheme": "ring", "stages": 2}),
    (2, 1, {"scheme": "gather", "keep_keys": True}),
    (2, 1, {"scheme": "gather", "head_chunks": 2}),
    (1, 2, {}),
    (1, 2, {"head_groups": 2}),
    (2, 1, PARTS),
]


@pytest.mark.parametrize(("ring", "ulysses", "options"), CASES, ids=str)
def test_attention_is_computed_once(pool: Pools, ring: int, ulysses: int, options: dict[str, Any]) -> None:
    for rank in pool(ring * ulysses).run(compared, ring, ulysses, options):
        for how, worst, count, once in rank:
            assert worst == 0.0, how
            assert count == (2 * once if how == "layer" else once), how


def one_layer() -> tuple[Layer, Layout, Tensor]:
    mesh = init_mesh()
    return Layer(mesh, backend="reference"), Layout(DOCS, mesh), torch.randn(75, SIZE, dtype=torch.float64)


def retained() -> bool:
    layer, layout, x = one_layer()
    recall = Recall()
    out = checkpoint(layer, x.requires_grad_(), layout, use_reentrant=False, context_fn=recall.contexts).sum()
    first, second = (torch.autograd.grad(out, x, retain_graph=again)[0] for again in (True, False))
    return torch.equal(first, second)


def test_a_retained_graph_takes_it_twice(pool: Pools) -> None:
    assert pool(1).run(retained) == [True]


def changed_in_place() -> str:
    layer, layout, x = one_layer()

    class Spoils(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = layer.project(x).view(len(x), -1, DIM).split((HEADS, 2, 2), 1)
            out = layer.first(q, k, v, layout)
            return layer.end(out.mul_(2).flatten(1))

    out = checkpoint(Spoils(), x.requires_grad_(), use_reentrant=False, context_fn=Recall().contexts)
    with pytest.raises(RuntimeError) as caught:
        out.sum().backward()
    return str(caught.value)


def test_an_output_that_is_changed_in_place_is_noticed(pool: Pools) -> None:
    (message,) = pool(1).run(changed_in_place)
    assert "attention's output was changed in place after it was kept" in message


def other_calls(second: str) -> str:
    """A layer that does something else where it is computed again, which autograd itself does not notice."""
    layer, layout, x = one_layer()
    turns = iter(["", second])

    def varying(x: Tensor) -> Tensor:
        turn = next(turns)
        q, k, v = layer.project(x).view(len(x), -1, DIM).split((HEADS, 2, 2), 1)
        if turn == "one more":
            with torch.no_grad():
                layer.second(q, k, v, layout)
        attention = layer.second if turn == "another mask" else layer.first
        return layer.end(attention(q, k, v, layout).flatten(1))

    out = checkpoint(varying, x.requires_grad_(), use_reentrant=False, context_fn=Recall().contexts)
    with pytest.raises(RuntimeError) as caught:
        out.sum().backward()
    return str(caught.value)


@pytest.mark.parametrize("second", ["one more", "another mask"])
def test_another_attention_than_there_was_is_noticed(pool: Pools, second: str) -> None:
    (message,) = pool(1).run(other_calls, second)
    assert "attention 1 of a layer is another one where the layer is computed again" in message
