"""Recurrences over ranks against every document alone, in float64: outputs and gradients of all inputs."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from ringattn import Documents, Layout, MeshShape
from ringattn.kept import kept_keys
from ringattn.recurrent import recurrence
from ringattn.recurrent.exchange import exchange, head_shares, plan_exchange
from ringattn.recurrent.kernels.chunked import Chunked
from ringattn.recurrent.kernels.contract import Inputs
from ringattn.recurrent.kernels.tokens import Tokens
from ringattn.recurrent.plan import plan_recurrence
from ringattn.recurrent.price import RoutePrice
from ringattn.recurrent.recurrence import parallel_recurrence
from ringattn.recurrent.scan import scan
from tests.parallel.ranks import mesh_of
from tests.pool import Pools
from tests.recurrent.problems import RULES, Truth, alone, inputs
from tests.recurrent.threads import on_ranks
from tests.strategies import documents

POLICIES = ("contiguous", "zigzag", "balanced")
HEADS = ((2, 4), (1, 3), (4, 4), (3, 6))


def layouts_of(docs: Documents, ring: int, ulysses: int, policy: str) -> list[Layout]:
    return [Layout(docs, MeshShape(1, ring, ulysses, rank), policy) for rank in range(ring * ulysses)]


def spread(x: Inputs, layouts: list[Layout], dout: torch.Tensor, route: str, kernel: Any, rounds: int = 1) -> Truth:
    """Over threads, put together again."""

    def work(rank: int, wire: Any) -> list[torch.Tensor]:
        layout = layouts[rank]
        leaves = Inputs(*(None if one is None else layout.shard(one).clone().requires_grad_() for one in x))
        if route == "exchange":
            plan = plan_exchange(layout, (x.k.shape[1], x.v.shape[1]))
            out = exchange(leaves, plan, kernel, wire)
        else:
            out = scan(leaves, plan_recurrence(layout, rounds=rounds), kernel, wire)
        out.backward(layout.shard(dout))
        calls.append(wire.calls)
        return [out.detach(), *(one.grad for one in leaves if one is not None)]

    calls: list[int] = []
    parts = on_ranks(len(layouts), work)
    assert len(set(calls)) == 1, "ranks called different numbers of collectives"
    whole = []
    for index in range(len(parts[0])):
        joined = torch.full((layouts[0].docs.total, *parts[0][index].shape[1:]), torch.nan, dtype=torch.float64)
        for layout, part in zip(layouts, parts, strict=True):
            joined[layout.indices()] = part[index].double().cpu()
        whole.append(joined)
    return Truth(whole[0], whole[1:])


def assert_same(found: Truth, truth: Truth) -> None:
    names = ["q", "k", "v", "decay", "beta or step"]
    torch.testing.assert_close(found.out, truth.out, rtol=1e-12, atol=1e-12)
    for name, got, expected in zip(names, found.grads, truth.grads, strict=False):
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(got / scale, expected / scale, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: n + m)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 12))
def test_every_head_is_on_one_rank_with_its_key_head(keys: int, each: int, ranks: int) -> None:
    layout = Layout(Documents([ranks]), MeshShape(1, ranks))
    found = []
    for rank in range(ranks):
        shares = head_shares((keys, keys * each), layout, rank)
        held = range(*shares.keys[rank]) if shares.copied is None else [shares.keys[rank][0] + i for i in shares.copied]
        assert len(held) == shares.key_heads
        assert shares.heads == 0 or shares.heads % shares.key_heads == 0, "no kernel takes that"
        found += [held[head * len(held) // shares.heads] for head in range(shares.heads)]
    assert found == [head // each for head in range(keys * each)]


@pytest.mark.parametrize("route", ["scan", "exchange"])
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_layout_is_every_document_alone(rule: str, route: str, data: st.DataObject) -> None:
    docs = data.draw(documents(longest=40, most=4))
    ring, ulysses = data.draw(st.sampled_from([(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4), (3, 1)]))
    layouts = layouts_of(docs, ring, ulysses, data.draw(st.sampled_from(POLICIES)))
    x = inputs(rule, docs.total, data.draw(st.sampled_from(HEADS)), seed=data.draw(st.integers(0, 99)))
    dout = torch.randn(x.v.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    kernel = data.draw(st.sampled_from([Chunked(), Chunked(), Tokens()]))
    rounds = data.draw(st.integers(1, 4)) if route == "scan" else 1
    assert_same(spread(x, layouts, dout, route, kernel, rounds), alone(x, docs, dout))


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=4, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_many_ranks_in_any_number_of_rounds(rule: str, data: st.DataObject) -> None:
    """Chains of up to 64 pieces beside short documents."""
    ranks = data.draw(st.sampled_from([12, 16, 32]))
    docs = Documents([3, data.draw(st.integers(100, 300)), 1, 40])
    layouts = layouts_of(docs, ranks, 1, data.draw(st.sampled_from(POLICIES)))
    x = inputs(rule, docs.total, (1, 2), seed=data.draw(st.integers(0, 99)))
    dout = torch.randn(x.v.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert_same(spread(x, layouts, dout, "scan", Chunked(), data.draw(st.integers(1, 6))), alone(x, docs, dout))


@pytest.mark.parametrize("rounds", [1, 2])
def test_whole_documents_are_run_while_states_are_under_way(rounds: int) -> None:
    """Forward and backward: between what leaves first and what is waited for first."""

    class Noted:
        """A wire that notes when something leaves and is waited for."""

        def __init__(self, wire: Any, events: list[str]) -> None:
            self.wire, self.events = wire, events

        def start(self, *args: Any) -> Any:
            self.events.append("leaves")
            arriving = self.wire.start(*args)
            return SimpleNamespace(wait=lambda: self.events.append("awaited") or arriving.wait())

    class Noting(Chunked):
        def __init__(self, events: list[str]) -> None:
            self.events = events

        def outputs(self, x: Inputs, lengths: tuple[int, ...]) -> torch.Tensor:
            self.events.append("whole")
            v = 1 * x.v  # the rows themselves have their gradient when all piles have theirs
            v.register_hook(lambda grad: self.events.append("whole"))
            return super().outputs(x._replace(v=v), lengths)

    docs = Documents([200, 30, 30, 30, 30])
    layouts = layouts_of(docs, 4, 1, "balanced")
    x = inputs("delta", docs.total)

    def work(rank: int, wire: Any) -> tuple[list[str], list[str]]:
        ahead: list[str] = []
        leaves = Inputs(*(None if one is None else layouts[rank].shard(one).clone().requires_grad_() for one in x))
        noted = Noted(wire, ahead)
        out = scan(leaves, plan_recurrence(layouts[rank], rounds=rounds), Noting(ahead), noted)
        forward = list(ahead)
        ahead.clear()
        out.sum().backward()
        return forward, list(ahead)

    held = [len(plan_recurrence(layout).whole) for layout in layouts]
    assert any(held)
    for whole, passes in zip(held, on_ranks(4, work), strict=True):
        for events in passes:
            assert events == ["leaves", *["whole"] * bool(whole), "awaited", *["leaves", "awaited"] * (rounds - 1)]


@pytest.mark.parametrize("rule", RULES)
def test_more_ranks_than_chunks(rule: str) -> None:
    """A document over eight ranks in sixteen pieces, beside short ones and padding."""
    docs = Documents([3, 300, 1], [2, 7, 310], 313)
    x = inputs(rule, docs.total)
    dout = torch.randn(x.v.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    truth = alone(x, docs, dout)
    for policy in POLICIES:
        assert_same(spread(x, layouts_of(docs, 8, 1, policy), dout, "scan", Chunked()), truth)


@pytest.mark.parametrize("route", ["scan", "exchange"])
def test_nothing_leaks_into_another_document(route: str) -> None:
    docs = Documents([9, 30, 1, 17])
    for rule in RULES:
        x = inputs(rule, docs.total)
        dout = torch.zeros(x.v.shape, dtype=torch.float64)
        dout[9:39] = 1.0
        for grad in spread(x, layouts_of(docs, 4, 1, "zigzag"), dout, route, Chunked()).grads:
            assert bool((grad[:9] == 0).all())
            assert bool((grad[39:] == 0).all())
            assert bool((grad[9:39] != 0).any())


def test_a_rank_without_pieces_takes_part() -> None:
    """It holds padding, or nothing at all, and still takes part in every collective."""
    docs = Documents([30, 8], [0, 30], 50)
    for rule in RULES:
        x = inputs(rule, docs.total)
        dout = torch.randn(x.v.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        for places in ([(0, 20), (20, 50), ()], [(0, 20), (20, 38), (38, 50)]):
            layouts = layouts_of(docs, 3, 1, "contiguous")
            for layout in layouts:
                held = tuple((place,) if place else () for place in places)
                layout.parts[0].__dict__["positions"] = held
                layout.parts[0].__dict__["position_sizes"] = tuple(sum(b - a for a, b in one) for one in held)
            for route in ("scan", "exchange"):
                assert_same(spread(x, layouts, dout, route, Chunked()), alone(x, docs, dout))


def on_rank(docs: Documents, rule: str, ring: int, ulysses: int, policy: str, route: str) -> list[torch.Tensor]:
    layout = Layout(docs, mesh_of(ring, ulysses), policy)
    x = inputs(rule, docs.total)
    leaves = Inputs(*(None if one is None else layout.shard(one).clone().requires_grad_() for one in x))
    q, k, v, decay, beta, step = leaves
    if step is not None:
        decay = decay[0]  # a rate, whose gradient is its row's
    out = parallel_recurrence(q, k, v, layout, decay=decay, beta=beta, step=step, route=route)
    dout = torch.randn(x.v.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    out.backward(layout.shard(dout))
    return [layout.unshard(one.detach()) for one in (out, *(one.grad for one in leaves if one is not None))]


@pytest.mark.parametrize(("ring", "ulysses"), [(2, 1), (2, 2), (4, 1)])
def test_over_gloo(pool: Pools, ring: int, ulysses: int) -> None:
    docs = Documents([2, 90, 0, 1, 33], [0, 2, 92, 95, 96], 140)
    cases = [
        (docs, rule, ring, ulysses, policy, route)
        for rule in RULES
        for policy, route in (("balanced", "scan"), ("contiguous", "scan"), ("zigzag", "scan"), ("zigzag", "exchange"))
    ]
    for case, ranks in zip(cases, pool(ring * ulysses).run_many(on_rank, cases), strict=True):
        x = inputs(case[1], docs.total)
        dout = torch.randn(x.v.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        truth = alone(x, docs, dout)
        rate = truth.grads[3].sum(0)
        for out, *grads in ranks:
            if case[1] == "steps":
                grads[3], truth.grads[3] = grads[3].sum(0), rate
            assert_same(Truth(out, grads), truth)


def in_rounds(docs: Documents, rule: str, rounds: int) -> list[torch.Tensor]:
    layout = Layout(docs, mesh_of(4, 1), "zigzag")
    x = inputs(rule, docs.total)
    leaves = Inputs(*(None if one is None else layout.shard(one).clone().requires_grad_() for one in x))
    priced = RoutePrice("scan", 1.0, 1.0, rounds), RoutePrice("exchange", 2.0, 1.0)
    with mock.patch.object(recurrence, "prices", return_value=priced):
        out = parallel_recurrence(leaves.q, leaves.k, leaves.v, layout, decay=leaves.decay, beta=leaves.beta)
    assert ("recurrence", layout.mesh.sequence_rank, rounds) in kept_keys(layout), "another number of rounds was taken"
    dout = torch.randn(x.v.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    out.backward(layout.shard(dout))
    return [layout.unshard(one.detach()) for one in (out, *(one.grad for one in leaves if one is not None))]


@pytest.mark.parametrize("rule", ["delta", "diagonal"])
def test_the_rounds_that_are_cheapest_are_taken_over_gloo(pool: Pools, rule: str) -> None:
    docs = Documents([2, 90, 0, 1, 33])
    x = inputs(rule, docs.total)
    dout = torch.randn(x.v.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    truth = alone(x, docs, dout)
    for ranks in pool(4).run_many(in_rounds, [(docs, rule, rounds) for rounds in (1, 2, 3)]):
        for out, *grads in ranks:
            assert_same(Truth(out, grads), truth)


@pytest.mark.parametrize("rounds", [1, 4])
def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_ranks(rounds: int) -> None:
    """Of states and maps a rank keeps those of its own pieces."""

    def kept_by(ranks: int) -> int:
        docs = Documents([8 * ranks])
        layouts = layouts_of(docs, ranks, 1, "zigzag")
        x = inputs("delta", docs.total)

        def work(rank: int, wire: Any) -> int:
            numbers: list[int] = []
            leaves = Inputs(*(None if one is None else layouts[rank].shard(one).clone().requires_grad_() for one in x))
            with saved_tensors_hooks(lambda one: numbers.append(one.numel() * (one.dim() > 3)) or one, lambda one: one):
                scan(leaves, plan_recurrence(layouts[rank], rounds=rounds), Chunked(), wire)
            return sum(numbers)

        return max(on_ranks(ranks, work))

    assert kept_by(16) == kept_by(4) > 0


@pytest.mark.parametrize("rule", RULES)
def test_a_split_in_bfloat16_is_as_accurate_as_one_kernel(rule: str) -> None:
    docs = Documents([400, 3, 109])
    wide = inputs(rule, docs.total, (2, 4), (16, 8))
    q, k, v = (one.bfloat16() for one in wide[:3])
    x = Inputs(q, k, v, wide.decay.float(), None if wide.beta is None else wide.beta.bfloat16())
    dout = torch.randn(v.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    exact = Inputs(*(None if one is None else one.double() for one in x))
    truth = alone(exact, docs, dout.double())
    single = spread(x, layouts_of(docs, 1, 1, "contiguous"), dout, "scan", Chunked())
    for policy in POLICIES:
        split = spread(x, layouts_of(docs, 4, 1, policy), dout, "scan", Chunked())
        for whole, parts, right in zip(
            [single.out, *single.grads], [split.out, *split.grads], [truth.out, *truth.grads], strict=True
        ):
            assert (parts - right).norm() <= 1.1 * (whole - right).norm()


def test_wrong_arguments_are_named() -> None:
    layout = Layout(Documents([4]), MeshShape())
    q, v, decay = torch.zeros(4, 2, 3), torch.zeros(4, 4, 5), torch.zeros(4, 4)
    wrong: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((q[:3], q, v, layout), {}, r"q must be \(4, heads, dim\), this rank's tokens, got \(3, 2, 3\)"),
        ((q[..., :2], q, v, layout), {}, r"q must have the shape of k, \(4, 2, 3\), got \(4, 2, 2\)"),
        ((q, q, v[:, :3], layout), {}, "v must have a multiple of k's 2 heads, got 3"),
        ((q, q, v, layout), {"decay": decay[:, :2]}, r"decay must be \(4, 4\) or \(4, 4, 3\), got \(4, 2\)"),
        ((q, q, v, layout), {"beta": q}, r"beta must be \(4, 4\) or None, got \(4, 2, 3\)"),
        ((q, q, v, layout), {"route": "ring"}, "route must be auto, scan or exchange, got 'ring'"),
        ((q, q, v, layout), {"backend": "fa3"}, "backend must be auto or one of mamba, fla, torch, tokens, got 'fa3'"),
        ((q, q, v, None), {}, "layout must be a Layout, got NoneType"),
        ((q, q, v, Layout(Documents([8]), MeshShape(ring=2))), {}, "layout must be on a mesh of running processes"),
    ]
    for arguments, options, words in wrong:
        with pytest.raises(ValueError, match=words):
            parallel_recurrence(*arguments, **{"decay": decay} | options)


def test_trees_are_refused_and_blocks_change_nothing() -> None:
    """A branch of a tree begins with what its parent ends with, which nobody computes; a block is causal there."""
    q, decay = torch.randn(9, 2, 3), -torch.rand(9, 2)
    tree = Layout(Documents.from_tree([4, 3, 2], [-1, 0, 0]), MeshShape())
    for route in ("scan", "exchange"):
        with pytest.raises(NotImplementedError, match=r"layout holds trees .* what its parent ends with"):
            parallel_recurrence(q, q, q, tree, decay=decay, route=route)
    plain, blocks = (Layout(Documents([9], blocks=found), MeshShape()) for found in ([], [(2, 6)]))
    out = [parallel_recurrence(q, q, q, layout, decay=decay) for layout in (plain, blocks)]
    assert torch.equal(*out)
