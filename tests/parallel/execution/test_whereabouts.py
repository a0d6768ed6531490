"""Whoever watches a rank hears of each transfer, on every rank alike, and of none after."""

import pytest
import torch

from ringattn import Documents, Layout, init_mesh, parallel_attention, whereabouts
from tests.pool import Pools


def heard(ring: int, ulysses: int, scheme: str) -> list[str]:
    """Of a forward and a backward pass."""
    mesh = init_mesh(ulysses=ulysses, device_type="cpu")
    layout = Layout(Documents([40, 24, 1]), mesh)
    tokens, found = layout.tokens(), []
    q, k, v = (torch.randn(tokens, 4, 8, requires_grad=True) for _ in range(3))
    whereabouts.listen(found.append)
    try:
        parallel_attention(q, k, v, layout, scheme=scheme).sum().backward()
    finally:
        whereabouts.listen(None)
    parallel_attention(q, k, v, layout, scheme=scheme).sum().backward()
    return found


@pytest.mark.parametrize(
    ("ulysses", "scheme", "wanted"),
    [
        (1, "gather", ["keys", "keys", "gradients of keys"]),
        (2, "ulysses", ["heads"] * 4),
    ],
)
def test_transfers_are_told_in_their_order(pool: Pools, ulysses: int, scheme: str, wanted: list[str]) -> None:
    assert pool(2).run(heard, 2 // ulysses, ulysses, scheme) == [wanted, wanted]
    assert set(wanted) <= set(whereabouts.TRANSFERS)
