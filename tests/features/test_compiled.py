"""FEATURES row 55: torch.compile passes through attention without a break, and other documents need no other graph."""

import pytest
import torch
from torch import Tensor, nn

from ringattn import Documents, Layout, Mask, ParallelAttention
from tests.parallel.ranks import mesh_of
from tests.pool import Pools


class Layer(nn.Module):
    """A projection, attention, and a projection."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = attention
        self.before = nn.Linear(32, 3 * 32, dtype=torch.float64)
        self.after = nn.Linear(32, 32, dtype=torch.float64)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        q, k, v = self.before(x).view(-1, 12, 8).split(4, 1)
        return x + self.after(self.attention(q, k, v, layout).flatten(1))


def on_mesh(ring: int, ulysses: int, sinks: bool, window: tuple[int, int]) -> tuple[list, int]:
    mesh = mesh_of(ring, ulysses)
    logits = nn.Parameter(torch.randn(4, dtype=torch.float64)) if sinks else None
    layouts = [Layout(Documents(lengths), mesh) for lengths in ([40, 3, 21], [64], [13, 80, 7], [90, 10])]
    return compiled_and_not(layouts, ParallelAttention(mesh, mask=Mask(window=window), sinks=logits))


def compiled_and_not(layouts: list[Layout], attention: ParallelAttention) -> tuple[list, int]:
    """Results of a layer with and without compilation over several layouts, and how many graphs were compiled."""
    layer = Layer(attention)
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list) -> object:
        nonlocal graphs
        graphs += 1
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    fast = torch.compile(layer, fullgraph=True, backend=count)
    pairs = []
    for layout in layouts:
        generator = torch.Generator().manual_seed(0)
        x = layout.shard(torch.randn(layout.docs.total, 32, dtype=torch.float64, generator=generator))
        results = []
        for run in (layer, fast):
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            out = run(leaf, layout)
            out.square().sum().backward()
            results.append([out.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())])
        pairs.append(results)
    return pairs, graphs


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize(("sinks", "window"), [(False, (-1, -1)), (True, (9, 0))])
def test_row_55_a_layer_is_one_graph_for_all_lengths(
    pool: Pools, ring: int, ulysses: int, sinks: bool, window: tuple[int, int]
) -> None:
    for pairs, graphs in pool(ring * ulysses).run(on_mesh, ring, ulysses, sinks, window):
        assert graphs <= 2  # the first, and one for any number of tokens
        for eager, compiled in pairs:
            for a, b in zip(eager, compiled, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
