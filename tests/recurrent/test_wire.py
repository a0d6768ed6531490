"""Rows to other ranks over gloo: what arrives, gradients of a row that went to several, and what a watcher hears."""

import torch

from ringattn import MeshShape, whereabouts
from ringattn.recurrent.wire import rows_of_others, wire_of
from tests.parallel.ranks import mesh_of
from tests.pool import Pools


def exchanged() -> tuple[list[float], list[float], list[str]]:
    """Rank 0 sends its rows 1 and 0 to itself and row 1 to the other one, which sends its row 0 to both."""
    mesh, heard = mesh_of(2, 1), []
    rank = mesh.sequence_rank
    x = torch.tensor([[1.0], [2.0], [3.0]]).add(10 * rank).requires_grad_()
    sent, sends, receives = (([1, 0, 1], [2, 1], [2, 1]), ([0, 0], [1, 1], [1, 1]))[rank]
    whereabouts.listen(heard.append)
    try:
        found = rows_of_others(x, torch.tensor(sent), sends, receives, wire_of(mesh, "features of images"))
        found.backward(found.detach() + 100 * rank)
    finally:
        whereabouts.listen(None)
    return found.flatten().tolist(), x.grad.flatten().tolist(), heard


def test_rows_reach_all_that_need_them_and_gradients_return(pool: Pools) -> None:
    (first, d_first, told), (second, d_second, told_too) = pool(2).run(exchanged)
    assert (first, second) == ([2.0, 1.0, 11.0], [2.0, 11.0])
    assert d_first == [1.0, 2.0 + 102.0, 0.0]
    assert d_second == [11.0 + 111.0, 0.0, 0.0]
    assert told == told_too == ["features of images"] * 2


def test_a_row_that_went_to_three_is_added_in_float32() -> None:
    """One rank that sends a row three times: 1 + 2^-8 + 2^-8 is 1 + 2^-7, and 1 where each addition is rounded."""
    x = torch.ones(2, 1, dtype=torch.bfloat16, requires_grad=True)
    wire = wire_of(MeshShape())
    found = rows_of_others(x, torch.tensor([0, 0, 0]), [3], [3], wire)
    found.backward(torch.tensor([[1.0], [2.0**-8], [2.0**-8]], dtype=torch.bfloat16))
    assert x.grad.flatten().tolist() == [1 + 2.0**-7, 0.0]
