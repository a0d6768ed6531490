"""Plans and tables of layers with states made ahead: all that these layers look for, and as good as their own."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringattn import Documents, Layout, Mask, MeshShape, parallel_attention
from ringattn.parallel.planning.ahead import from_bytes, install, to_bytes
from ringattn.recurrent import (
    ahead,
    convolution,
    exchange,
    halo_plan,
    parallel_convolution,
    parallel_recurrence,
    recurrence,
    scan,
)
from ringattn.recurrent.ahead import Mixer, make_tables, mixers_of, plan_mixers
from ringattn.recurrent.halo_plan import HaloKey
from ringattn.recurrent.kernels.contract import Inputs
from ringattn.recurrent.price import RecurrenceShape
from ringattn.recurrent.recurrence import RecurrenceKey
from tests.parallel.ranks import mesh_of
from tests.pool import Pools
from tests.recurrent.problems import inputs
from tests.strategies import documents

CPU = torch.device("cpu")
DOCS = Documents([2, 90, 0, 1, 33, 60])
TAPS = 4
SHAPE = RecurrenceShape(2, 4, 16, 8, True, False)
# What makes a plan or a table of these layers, by where it is looked for.
MAKERS = (
    (recurrence, "prices"), (recurrence, "plan_recurrence"), (recurrence, "plan_exchange"), (halo_plan, "_make"),
    (convolution, "_make_tables"), (scan, "rows_of"), (exchange, "to_device"),
)  # fmt: skip


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of makers that are called meanwhile."""
    made: list[str] = []

    def noting(name: str, make: object) -> object:
        return lambda *args, **kwargs: made.append(name) or make(*args, **kwargs)

    with ExitStack() as stack:
        for place, name in MAKERS:
            stack.enter_context(mock.patch.object(place, name, noting(name, getattr(place, name))))
        yield made


def layers(layout: Layout, rule: str, route: str) -> list[torch.Tensor]:
    """A convolution and a recurrence of its output, twice as in a model: outputs and all gradients."""
    x = inputs(rule, layout.docs.total)
    leaves = Inputs(*(None if one is None else layout.shard(one).clone().requires_grad_() for one in x))
    weight = torch.ones(leaves.v[0].numel(), TAPS, dtype=torch.float64, requires_grad=True)
    v = leaves.v
    for _ in range(2):
        v = parallel_convolution(v.flatten(1), weight, None, layout).view_as(v)
        v = parallel_recurrence(
            leaves.q, leaves.k, v, layout, decay=leaves.decay, beta=leaves.beta, step=leaves.step, route=route
        )
    v.square().sum().backward()
    return [v.detach(), weight.grad, *(one.grad for one in leaves if one is not None)]


def made_ahead_and_not(rule: str, route: str) -> tuple[list[str], list[str], list[torch.Tensor], list[torch.Tensor]]:
    """What makers were called without and with plans that came from elsewhere, and the results of both."""
    mesh = mesh_of(2, 1)
    here = Layout(DOCS, mesh, "zigzag")
    with counted() as made_here:
        expected = layers(here, rule, route)
    sent = Layout(DOCS, mesh.shape, "zigzag")
    layout, plans = from_bytes(to_bytes((sent, plan_mixers(sent, mixers_of(here)))), mesh)
    make_tables(plans, CPU)
    install(layout, plans)
    with counted() as made:
        found = layers(layout, rule, route)
    return made_here, made, expected, found


@pytest.mark.parametrize("route", ["scan", "exchange", "auto"])
@pytest.mark.parametrize("rule", ["delta", "diagonal"])
def test_layers_find_all_that_was_made_ahead(pool: Pools, rule: str, route: str) -> None:
    for made_here, made, expected, found in pool(2).run(made_ahead_and_not, rule, route):
        assert {"prices", "_make", "_make_tables"} < set(made_here), "the makers are not those that a layer calls"
        assert len(made_here) - made_here.count("to_device") - made_here.count("rows_of") == 4, "made for every layer"
        assert made == []
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@given(docs=documents(), ranks=st.sampled_from([1, 2, 3, 8]), policy=st.sampled_from(["contiguous", "zigzag"]))
def test_plans_that_arrive_are_those_that_are_made_here(docs: Documents, ranks: int, policy: str) -> None:
    mesh = MeshShape(1, ranks, 1, ranks - 1)
    keys: tuple[Mixer, ...] = (
        *(RecurrenceKey(SHAPE, route) for route in ("auto", "scan", "exchange")),
        HaloKey(TAPS, mesh.sequence_rank),
    )
    sent, here = Layout(docs, mesh, policy), Layout(docs, mesh, policy)
    arrived, plans = from_bytes(to_bytes((sent, plan_mixers(sent, keys))), mesh)
    assert plans == plan_mixers(here, keys)
    install(arrived, plans)
    assert mixers_of(arrived) == keys


def test_mixers_are_those_that_ran() -> None:
    layout = Layout(Documents([9, 4]), MeshShape())
    assert mixers_of(layout) == ()
    x = torch.zeros(13, 2, 8)
    parallel_attention(x, x, x, layout, mask=Mask(window=(3, 0)))
    for _ in range(2):
        parallel_recurrence(x, x, x, layout, decay=x[..., 0])
        parallel_convolution(x[:, 0], torch.ones(8, TAPS), None, layout)
    attention, *others = mixers_of(layout)
    assert isinstance(attention, ahead.Attention)
    assert others == [RecurrenceKey(RecurrenceShape(2, 2, 8, 8, False, False, 4), "auto"), HaloKey(TAPS, 0)]


@pytest.mark.parametrize("route", ["scan", "exchange"])
def test_little_is_sent_and_it_goes_with_the_batch(route: str) -> None:
    """Of 300 documents on 8 ranks; and nothing but the layout keeps plans and their tables."""
    layout = Layout(Documents([977] * 300), MeshShape(1, 8, 1, 3))
    data = to_bytes((layout, plan_mixers(layout, [RecurrenceKey(SHAPE, route), HaloKey(TAPS, 3)])))
    assert len(data) < 25_000
    arrived, plans = from_bytes(data, layout.mesh)
    make_tables(plans, CPU)
    install(arrived, plans)
    held = [weakref.ref(plan) for _, plan in plans]
    del arrived, plans
    gc.collect()
    assert all(one() is None for one in held)
