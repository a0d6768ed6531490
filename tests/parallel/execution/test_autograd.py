"""Attention inside larger graphs: checkpointing, several calls in flight, and gathering."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ringattn import Documents, Layout, Mask, ParallelAttention
from tests.dense import Case, dense_attention
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

DOCS = Documents([33, 1, 0, 80, 14], [0, 35, 36, 36, 116])
MESHES = [(2, 1, "ring"), (2, 1, "gather"), (2, 1, "joint"), (1, 2, "ulysses"), (2, 2, "hybrid")]


def _layer(case: Case, ring: int, ulysses: int, scheme: str) -> tuple[Callable[..., Tensor], Layout, dict[str, Tensor]]:
    mesh = mesh_of(ring, ulysses)
    layout = Layout(case.docs, mesh, "balanced")
    attend = ParallelAttention(mesh, mask=case.mask, scheme=scheme)
    local = {name: layout.shard(x).clone() for name, x in case.tensors().items() if name != "sinks"}
    for name in ("q", "k", "v"):
        local[name].requires_grad_()
    return partial(attend, layout=layout), layout, local


def _whole(layout: Layout, local: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"d{name}": layout.unshard(local[name].grad) for name in ("q", "k", "v")}


def checkpointed(case: Case, ring: int, ulysses: int, scheme: str, reentrant: bool | None) -> dict[str, Tensor]:
    """Two layers after each other, each recomputed in the backward pass (reentrant None: not)."""
    attend, layout, x = _layer(case, ring, ulysses, scheme)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q + attend(torch.tanh(q), k, v)

    hidden = x["q"]
    for _ in range(2):
        if reentrant is None:
            hidden = step(hidden, x["k"], x["v"])
        else:
            hidden = checkpoint(step, hidden, x["k"], x["v"], use_reentrant=reentrant)
    hidden.backward(x["dout"])
    return _whole(layout, x)


@pytest.mark.parametrize(("ring", "ulysses", "scheme"), MESHES)
def test_checkpointing_gives_the_same_gradients(pool: Pools, ring: int, ulysses: int, scheme: str) -> None:
    case = Case(DOCS, Mask(), (4, 2))
    kept, reentrant, other = (
        pool(ring * ulysses).run(checkpointed, case, ring, ulysses, scheme, how)[0] for how in (None, True, False)
    )
    for name, gradient in kept.items():
        assert gradient.abs().max() > 0
        assert torch.equal(gradient, reentrant[name])
        assert torch.equal(gradient, other[name])


def interleaved(case: Case, ring: int, ulysses: int, scheme: str, reverse: bool) -> list[dict[str, Tensor]]:
    """Two forward passes, then their backward passes in either order."""
    attend, layout, first = _layer(case, ring, ulysses, scheme)
    second = {name: (x.detach() * 0.5).requires_grad_(x.requires_grad) for name, x in first.items()}
    outs = [attend(x["q"], x["k"], x["v"]) for x in (first, second)]
    pairs = list(zip(outs, (first, second), strict=True))
    for out, x in pairs[::-1] if reverse else pairs:
        out.backward(x["dout"])
    return [_whole(layout, x) for x in (first, second)]


@pytest.mark.parametrize(("ring", "ulysses", "scheme"), MESHES)
def test_two_forwards_in_flight(pool: Pools, ring: int, ulysses: int, scheme: str) -> None:
    case = Case(DOCS, Mask(window=(20, 0)), (4, 2))
    expected = dense_attention(case)
    forward, backward = (
        pool(ring * ulysses).run(interleaved, case, ring, ulysses, scheme, reverse)[0] for reverse in (False, True)
    )
    for (one, other), name in [(pair, name) for pair in zip(forward, backward, strict=True) for name in pair[0]]:
        assert torch.equal(one[name], other[name])
    for name in ("dq", "dk", "dv"):
        torch.testing.assert_close(forward[0][name], expected[name], rtol=1e-12, atol=1e-12)


def gathered(docs: Documents, ring: int, ulysses: int, policy: str, dim: int, grad: str) -> dict[str, Any]:
    layout = Layout(docs, mesh_of(ring, ulysses), policy)
    shape = [3, 2]
    shape.insert(dim, docs.total)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    whole = layout.unshard(layout.shard(x, dim), dim, grad=grad)
    scale = 1.0 if grad == "same" else 1.0 + dist.get_rank(layout.mesh.sequence_group)
    (whole * x.detach() * scale).sum().backward()
    local = layout.shard(x.detach(), dim)
    ranks = ring * ulysses
    factor = 1.0 if grad == "same" else ranks * (ranks + 1) / 2
    return {
        "roundtrip": torch.equal(whole, x),
        "gradient": torch.allclose(layout.shard(x.grad, dim), local * factor),
        "positions": layout.unshard(layout.position_ids()),
        "indices": layout.unshard(layout.indices()),
    }


@pytest.mark.parametrize("policy", ["contiguous", "zigzag", "balanced"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("grad", ["same", "partial"])
def test_unshard_is_the_inverse_of_shard(pool: Pools, policy: str, dim: int, grad: str) -> None:
    for ring, ulysses in ((1, 1), (2, 1), (2, 2)):
        for result in pool(ring * ulysses).run(gathered, DOCS, ring, ulysses, policy, dim, grad):
            assert result["roundtrip"]
            assert result["gradient"]
            assert result["indices"].tolist() == list(range(DOCS.total))
            for start, size in zip(DOCS.starts, DOCS.lengths, strict=True):
                assert result["positions"][start : start + size].tolist() == list(range(size))
