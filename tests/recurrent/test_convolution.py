"""Convolutions over ranks against every document alone, in float64: outputs and all gradients."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ringattn import Documents, Layout, MeshShape
from ringattn.recurrent.convolution import convolve, parallel_convolution
from ringattn.recurrent.halo_plan import plan_halo
from tests.parallel.ranks import mesh_of
from tests.pool import Pools
from tests.recurrent.threads import on_ranks
from tests.strategies import documents

CHANNELS = 3


def problem(docs: Documents, taps: int, bias: bool, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(docs.total, CHANNELS), (docs.total, CHANNELS), (CHANNELS, taps), *([(CHANNELS,)] if bias else [])]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def alone(docs: Documents, x: torch.Tensor, dout: torch.Tensor, *parameters: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of x and the parameters; every sum is written out."""
    leaves = [one.clone().requires_grad_() for one in (x, *parameters)]
    weight, bias = leaves[1], leaves[2] if len(leaves) > 2 else 0.0
    taps = weight.shape[1]
    out = torch.zeros_like(x)
    total = sum(one.sum() for one in leaves) * 0
    for start, length in zip(docs.starts, docs.lengths, strict=True):
        rows = []
        for p in range(length):
            row = bias + torch.zeros(CHANNELS, dtype=torch.float64)
            for j in range(taps):
                if p - taps + 1 + j >= 0:
                    row = row + weight[:, j] * leaves[0][start + p - taps + 1 + j]
            rows.append(F.silu(row))
        if rows:
            found = torch.stack(rows)
            out[start : start + length] = found.detach()
            total = total + (found * dout[start : start + length]).sum()
    total.backward()
    return [out, *(one.grad for one in leaves)]


def on_threads(layouts: list[Layout], x: torch.Tensor, dout: torch.Tensor, *parameters: torch.Tensor) -> list[Any]:
    def work(rank: int, wire: Any) -> list[torch.Tensor]:
        layout = layouts[rank]
        leaves = [one.clone().requires_grad_() for one in (layout.shard(x), *parameters)]
        plan = plan_halo(layout, parameters[0].shape[1])
        out = convolve(leaves[0], leaves[1], leaves[2] if len(leaves) > 2 else None, plan, wire, "silu")
        out.backward(layout.shard(dout))
        return [out.detach(), *(one.grad for one in leaves)]

    ranks = on_ranks(len(layouts), work)
    found = []
    for index in range(2):
        whole = torch.full_like(x, torch.nan)
        for layout, parts in zip(layouts, ranks, strict=True):
            whole[layout.indices()] = parts[index]
        found.append(whole)
    return found + [sum(parts[index] for parts in ranks) for index in range(2, len(ranks[0]))]


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_layout_is_every_document_alone(data: st.DataObject) -> None:
    docs = data.draw(documents(longest=25, most=4))
    ring, ulysses = data.draw(st.sampled_from([(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (8, 1)]))
    policy = data.draw(st.sampled_from(["contiguous", "zigzag", "balanced"]))
    layouts = [Layout(docs, MeshShape(1, ring, ulysses, rank), policy) for rank in range(ring * ulysses)]
    tensors = problem(docs, data.draw(st.sampled_from([1, 2, 4, 7])), data.draw(st.booleans()))
    for got, expected in zip(on_threads(layouts, *tensors), alone(docs, *tensors), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_what_is_not_of_the_document_may_be_anything(data: st.DataObject) -> None:
    """NaN in padding and in one document: the others have the outputs and gradients that they have alone."""
    docs = data.draw(documents(longest=20, most=4))
    ring = data.draw(st.sampled_from([1, 2, 4]))
    policy = data.draw(st.sampled_from(["zigzag", "balanced"]))
    layouts = [Layout(docs, MeshShape(1, ring, 1, rank), policy) for rank in range(ring)]
    x, dout, weight = problem(docs, 4, False)
    expected = alone(docs, x, dout, weight)
    bad = data.draw(st.integers(0, max(0, len(docs.lengths) - 1)))
    given_x, fine = torch.full_like(x, torch.nan), torch.zeros(len(x), dtype=torch.bool)
    for number, (start, length) in enumerate(zip(docs.starts, docs.lengths, strict=True)):
        fine[start : start + length] = number != bad
    given_x[fine] = x[fine]
    found = on_threads(layouts, given_x, dout, weight)
    for got, right in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(got[fine], right[fine], rtol=1e-12, atol=1e-12)


def test_pieces_shorter_than_the_convolution() -> None:
    """Ten tokens over eight ranks in pieces of one: six rows come of six pieces."""
    docs = Documents([10, 1, 3])
    layouts = [Layout(docs, MeshShape(1, 8, 1, rank), "zigzag") for rank in range(8)]
    tensors = problem(docs, 7, True)
    for got, expected in zip(on_threads(layouts, *tensors), alone(docs, *tensors), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_lent_rows_are_rounded_once() -> None:
    """In bfloat16: what pieces on other ranks give back is added to a row's own gradient before that is rounded."""
    docs = Documents([64])
    layouts = [Layout(docs, MeshShape(1, 8, 1, rank), "zigzag") for rank in range(8)]
    x, dout, weight = (one.bfloat16() for one in problem(docs, 4, False))
    expected = alone(docs, *(one.double() for one in (x, dout, weight)))[1]
    found = on_threads(layouts, x, dout, weight)[1].double()
    assert (found - expected).norm() / expected.norm() < 4e-3


def on_rank(docs: Documents, policy: str, taps: int) -> list[torch.Tensor]:
    import torch.distributed as dist

    mesh = mesh_of(2, 2)
    layout = Layout(docs, mesh, policy)
    x, dout, weight, bias = problem(docs, taps, True)
    leaves = [one.clone().requires_grad_() for one in (layout.shard(x), weight, bias)]
    out = parallel_convolution(*leaves, layout, activation="silu")
    out.backward(layout.shard(dout))
    for parameter in leaves[1:]:
        dist.all_reduce(parameter.grad, group=mesh.sequence_group)
    return [layout.unshard(out.detach()), layout.unshard(leaves[0].grad), leaves[1].grad, leaves[2].grad]


def test_over_gloo(pool: Pools) -> None:
    docs = Documents([2, 30, 0, 1, 13], [0, 2, 32, 35, 36], 52)
    cases = [(docs, policy, taps) for policy in ("contiguous", "zigzag", "balanced") for taps in (1, 4)]
    for case, ranks in zip(cases, pool(4).run_many(on_rank, cases), strict=True):
        for found in ranks:
            for got, expected in zip(found, alone(docs, *problem(docs, case[2], True)), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_wrong_arguments_are_named() -> None:
    layout = Layout(Documents([4]), MeshShape())
    x, weight = torch.zeros(4, 3), torch.zeros(3, 2)
    wrong = [
        ((x[:3], weight, None, layout), {}, r"x must be \(4, C\), this rank's tokens, got \(3, 3\)"),
        ((x, weight[:2], None, layout), {}, r"weight must be \(3, taps\), got \(2, 2\)"),
        ((x, weight, weight, layout), {}, r"bias must be \(3,\) or None, got \(3, 2\)"),
        ((x, weight, None, layout), {"activation": "gelu"}, "activation must be one of None, silu, swish, got 'gelu'"),
        ((x, weight, None, None), {}, "layout must be a Layout, got NoneType"),
    ]
    for arguments, options, words in wrong:
        with pytest.raises(ValueError, match=words):
            parallel_convolution(*arguments, **options)


def test_trees_are_refused() -> None:
    tree = Layout(Documents.from_tree([4, 3, 2], [-1, 0, 0]), MeshShape())
    with pytest.raises(NotImplementedError, match=r"layout holds trees .* what its parent ends with"):
        parallel_convolution(torch.zeros(9, 3), torch.zeros(3, 2), None, tree)
