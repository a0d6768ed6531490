"""FEATURES row 55: torch.compile passes through attention without a break, and other documents need no other graph."""

import pytest
import torch
from torch import Tensor, nn

from ringattn import Documents, Layout, Mask, MeshShape, ParallelAttention, parallel_attention
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


@pytest.mark.parametrize("mixed", [False, True])
def test_row_55_a_compiled_layer_follows_autocast(mixed: bool) -> None:
    """Also where rotated queries and keys are wide and values narrow."""
    layout = Layout(Documents([20, 5]), MeshShape())
    q, k, v = (torch.randn(25, 2, 8, generator=torch.Generator().manual_seed(0)) for _ in range(3))
    v = v.bfloat16() if mixed else v

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return parallel_attention(q, k, v, layout)

    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        eager, fast = attend(q, k, v), torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v)
    assert eager.dtype == fast.dtype == torch.bfloat16
    assert torch.equal(eager, fast)
