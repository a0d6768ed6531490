"""Rows to other ranks over gloo: what arrives, gradients that go back, and what a watcher hears."""

import torch

from ringattn import MeshShape, whereabouts
from ringattn.recurrent.wire import exchanged, wire_of
from tests.parallel.ranks import mesh_of
from tests.pool import Pools


def sent_over() -> tuple[list[float], list[float], list[str]]:
    """Rank 0 keeps two rows and sends the other one one; that one sends a row and keeps one."""
    mesh, heard = mesh_of(2, 1), []
    rank = mesh.sequence_rank
    x = torch.tensor([[1.0], [2.0], [3.0]][: 3 - rank], dtype=torch.float64).add(10 * rank).requires_grad_()
    sends, receives = (([2, 1], [2, 1]), ([1, 1], [1, 1]))[rank]
    whereabouts.listen(heard.append)
    try:
        found = exchanged(x, sends, receives, wire_of(mesh, "features of images"))
        found.backward(found.detach() + 100 * rank)
    finally:
        whereabouts.listen(None)
    return found.flatten().tolist(), x.grad.flatten().tolist(), heard


def test_rows_arrive_and_gradients_return(pool: Pools) -> None:
    (first, d_first, told), (second, d_second, told_too) = pool(2).run(sent_over)
    assert (first, second) == ([1.0, 2.0, 11.0], [3.0, 12.0])
    assert (d_first, d_second) == ([1.0, 2.0, 103.0], [11.0, 112.0])
    assert told == told_too == ["features of images"] * 2


def test_one_rank_has_what_it_sends() -> None:
    x = torch.tensor([[1.0], [2.0]], requires_grad=True)
    found = exchanged(x, [2], [2], wire_of(MeshShape()))
    found.backward(3 * found.detach())
    assert found.flatten().tolist() == [1.0, 2.0]
    assert x.grad.flatten().tolist() == [3.0, 6.0]
