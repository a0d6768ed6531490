"""A layer with attention in it, and its results with and without torch.compile."""

import torch
from torch import Tensor, nn

from ringattn import Layout, ParallelAttention


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
