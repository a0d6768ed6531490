"""Features of images on their way to the tokens: who computes which, and values and gradients of what arrives."""

from itertools import accumulate
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ringattn import Documents, Layout, MeshShape
from ringattn.hf.image_features import placed_features
from ringattn.hf.vision import ImageDeal
from tests.recurrent.threads import on_ranks

Deal = tuple[Documents, tuple[int, int], list[int], Tensor]


@st.composite
def dealt(draw: st.DrawFn) -> Deal:
    """Documents, a mesh, tokens of each image, and their places."""
    docs = Documents(draw(st.lists(st.integers(0, 60), min_size=1, max_size=4).filter(any)))
    tokens = draw(st.lists(st.integers(1, 9), min_size=1, max_size=7).filter(lambda found: sum(found) <= docs.total))
    places = draw(st.permutations(range(docs.total)))[: sum(tokens)]
    mesh = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1), (1, 4)]))
    return docs, mesh, tokens, torch.tensor(sorted(places))


@settings(max_examples=60, deadline=None)
@given(case=dealt(), policy=st.sampled_from(["contiguous", "balanced"]))
def test_every_image_is_computed_once_and_reaches_its_tokens(case: Deal, policy: str) -> None:
    docs, (ring, ulysses), tokens, where = case
    ranks, weights = ring * ulysses, [1 + size for size in tokens]
    layouts = [Layout(docs, MeshShape(1, ring, ulysses, rank), policy) for rank in range(ranks)]
    deals = [ImageDeal.of(layout, where, tokens, weights) for layout in layouts]
    ends = [0, *accumulate(tokens)]
    outgoing, loads, owned = [], [], []
    for deal in deals:
        # The features of a token are its number.
        features = torch.cat([torch.arange(ends[image], ends[image + 1]) for image in deal.computed])
        assert len(features) == deal.tokens
        outgoing.append(features[deal.send].split(deal.sends))
        if len(deal.send):
            owned += deal.computed
            loads.append(sum(weights[image] for image in deal.computed))
    assert sorted(owned) == list(range(len(tokens)))
    assert not loads or max(loads) - (min(loads) if len(loads) == ranks else 0) <= max(weights)
    for rank, (layout, deal) in enumerate(zip(layouts, deals, strict=True)):
        assert sorted(deal.send.tolist()) == list(range(len(deal.send))), "a feature is of one token, on one rank"
        assert sorted(deal.place.tolist()) == list(range(sum(deal.receives)))
        assert deal.receives == tuple(len(parts[rank]) for parts in outgoing)
        placed = torch.cat([parts[rank] for parts in outgoing])[deal.place]
        index = layout.indices()
        assert torch.equal(where[placed], index[torch.isin(index, where)])


@settings(max_examples=40, deadline=None)
@given(case=dealt(), dtype=st.sampled_from([torch.float64, torch.bfloat16]))
def test_features_and_their_gradients_are_those_of_the_tokens(case: Deal, dtype: torch.dtype) -> None:
    """Also on a rank that computes an image that counts nowhere, whose gradient is 0."""
    docs, (ring, ulysses), tokens, where = case
    ranks, weights = ring * ulysses, [1 + size for size in tokens]
    layouts = [Layout(docs, MeshShape(1, ring, ulysses, rank)) for rank in range(ranks)]
    deals = [ImageDeal.of(layout, where, tokens, weights) for layout in layouts]
    draw = torch.Generator().manual_seed(0)
    features, dout = (torch.randn(size, 3, generator=draw).to(dtype) for size in (sum(tokens), docs.total))
    ends = [0, *accumulate(tokens)]

    def work(rank: int, wire: Any) -> tuple[Tensor, Tensor, int]:
        rows = torch.cat([features[ends[image] : ends[image + 1]] for image in deals[rank].computed]).requires_grad_()
        found = placed_features(rows, deals[rank], wire)
        index = layouts[rank].indices()
        (grad,) = torch.autograd.grad(found, rows, dout[index[torch.isin(index, where)]])
        return found.detach(), grad, wire.calls

    stream = torch.zeros(docs.total, 3, dtype=dtype)
    stream[where] = features
    for layout, deal, (found, grad, calls) in zip(layouts, deals, on_ranks(ranks, work), strict=True):
        index = layout.indices()
        assert torch.equal(found, stream[index[torch.isin(index, where)]])
        own = torch.cat([dout[where[ends[image] : ends[image + 1]]] for image in deal.computed])
        assert torch.equal(grad, own if len(deal.send) else torch.zeros_like(own))
        assert calls == 2


class Operations(TorchDispatchMode):
    """The names of what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_nothing_is_filled_with_zeros_or_added() -> None:
    """Each feature has one token, so that gradients are only put into their places."""
    tokens, where = [40, 8], torch.arange(20, 68)
    layouts = [Layout(Documents([100]), MeshShape(1, 2, 1, rank)) for rank in range(2)]
    deals = [ImageDeal.of(layout, where, tokens, tokens) for layout in layouts]

    def work(rank: int, wire: Any) -> list[str]:
        rows = torch.randn(deals[rank].tokens, 3, requires_grad=True)
        found = placed_features(rows, deals[rank], wire)
        with Operations() as seen:
            torch.autograd.grad(found, rows, torch.ones_like(found))
        return seen.names

    for names in on_ranks(2, work):
        assert any("index" in name for name in names), "the test sees nothing"
        assert not [name for name in names if "zero" in name or "add" in name]
