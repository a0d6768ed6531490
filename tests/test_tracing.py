"""Host code in compiled functions: what it makes is what it makes outside."""

import pytest
import torch
from torch import Tensor

from ringattn import Documents, Layout, MeshShape
from ringattn.parallel.machine.shipped import SHIPPED


def of_one_rank(x: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    layout = Layout(Documents(lengths), MeshShape(1, 4, 1, 1, machine=SHIPPED["H200"]))
    return layout.shard(x) * 2, layout.indices()


def test_a_layout_that_is_made_inside_is_the_same() -> None:
    """Balanced placement computes with floats: traced, they are another library's."""
    torch._dynamo.reset()
    compiled = torch.compile(of_one_rank, backend="eager")
    for lengths in ([100, 30], [5] * 40):
        x = torch.randn(sum(lengths), 2)
        for found, expected in zip(compiled(x, lengths), of_one_rank(x, lengths), strict=True):
            assert torch.equal(found, expected)


def test_a_whole_graph_refuses_it_by_name() -> None:
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="layouts and plans are made by the host"):
        torch.compile(of_one_rank, backend="eager", fullgraph=True)(torch.ones(8, 2), [8])
