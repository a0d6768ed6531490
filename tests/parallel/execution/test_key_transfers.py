"""Keys travel as narrow and as short as the kernel reads them."""

import warnings
from typing import Any

import torch
from torch import Tensor

from ringattn import Documents, Layout, parallel_attention
from ringattn.parallel.transport.collective import GroupTransport
from tests.parallel.ranks import mesh_of
from tests.pool import Pools
from tests.small_tensors import tensors


def on_the_wire(dtypes: tuple[torch.dtype, ...], autocast: bool, dims: tuple[int, int] = (8, 8)) -> dict[str, Any]:
    """Dtypes and bytes that a ring of two sends of its keys in the forward pass, and what comes back."""
    sent: list[Tensor] = []
    exchange = GroupTransport.exchange

    def watched(self: GroupTransport, send: Tensor, receive: Tensor, route: Any) -> Any:
        sent.append(send)
        return exchange(self, send, receive, route)

    layout = Layout(Documents([20]), mesh_of(2, 1), "contiguous")
    local = [layout.shard(x).to(dtype) for x, dtype in zip(tensors(dims), dtypes, strict=True)]
    GroupTransport.exchange = watched  # type: ignore[method-assign]
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), warnings.catch_warnings():
            warnings.simplefilter("error")
            out = parallel_attention(*local, layout, scheme="gather")
    finally:
        GroupTransport.exchange = exchange  # type: ignore[method-assign]
    return {
        "dtypes": {x.dtype for x in sent},
        "bytes": sum(x.numel() * x.element_size() for x in sent),
        "rows": layout.tokens(),
        "out": out.dtype,
    }


def test_under_autocast_the_wire_is_narrow(pool: Pools) -> None:
    """Queries of a norm in float32 beside keys of a bfloat16 layer: cast before they are sent."""
    wide, narrow = torch.float32, torch.bfloat16
    for dtypes in ((wide, narrow, narrow), (wide, wide, wide)):
        results = pool(2).run(on_the_wire, dtypes, True)
        assert {dtype for found in results for dtype in found["dtypes"]} == {narrow}
        assert all(found["out"] == narrow for found in results)
    assert {dtype for found in pool(2).run(on_the_wire, (wide,) * 3, False) for dtype in found["dtypes"]} == {wide}


def test_values_of_another_dim_are_not_padded_on_the_wire(pool: Pools) -> None:
    """The first of two ranks sends its 10 rows of two heads; the second has no query's keys to send."""
    results = pool(2).run(on_the_wire, (torch.float64,) * 3, False, (24, 12))
    assert [found["rows"] for found in results] == [10, 10]
    assert [found["bytes"] for found in results] == [10 * 2 * (24 + 12) * 8, 0]
