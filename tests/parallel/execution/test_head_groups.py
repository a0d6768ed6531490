"""Heads that are exchanged in groups: the same results, and one group under way while another is computed."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch

from ringattn import Documents, Layout, Mask, MeshShape
from ringattn.kernels.spec import Options
from ringattn.parallel.execution.job import Job
from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.parallel.plan.exchange import exchange_plan
from ringattn.parallel.plan.plan import AttentionPlan, Stage
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.planner import plan_attention
from ringattn.settings import AttentionOptions
from tests.dense import Case, dense_attention
from tests.parallel.choice.test_schedule import with_links
from tests.parallel.execution.test_late_transfers import errors
from tests.parallel.ranks import attend, mesh_of
from tests.pool import Pools

DOCS = Documents([40, 5, 1, 0, 23], [0, 40, 45, 46, 50], 75)
HEADS = [(8, 2), (8, 8), (8, 1), (4, 4), (6, 2), (7, 7)]


def attend_all(case: Case, ulysses: int) -> dict[str, torch.Tensor]:
    return attend(case, 1, ulysses, "contiguous", "ulysses")


@pytest.mark.parametrize("ulysses", [2, 4])
@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("heads", HEADS)
def test_groups_change_nothing(pool: Pools, heads: tuple[int, int], groups: int, ulysses: int) -> None:
    cases = [
        Case(DOCS, mask, heads, (8, 8), torch.float64, sinks=sinks, dropout=dropout, options={"head_groups": groups})
        for mask, sinks, dropout in ((Mask(), True, None), (Mask(causal=False, window=(9, 4)), False, (0.3, 7)))
    ]
    for case, results in zip(cases, pool(ulysses).run_many(attend_all, [(c, ulysses) for c in cases]), strict=True):
        expected = dense_attention(case)
        for got in results:
            for name, x in expected.items():
                torch.testing.assert_close(got[name], x, rtol=1e-12, atol=1e-12)


def planned_groups(ulysses: int, heads: tuple[int, int], asked: int | None) -> int:
    layout = Layout(DOCS, mesh_of(1, ulysses))
    exchange = plan_attention(layout, Shape(*heads, 128, 128), AttentionOptions(head_groups=asked)).exchange
    assert exchange is not None
    return exchange.groups


def test_no_more_groups_than_heads_part_into(pool: Pools) -> None:
    for heads, asked, groups in (((8, 2), 4, 4), ((8, 8), 3, 2), ((6, 2), 2, 1), ((6, 2), 3, 3), ((7, 7), 4, 1)):
        assert pool(2).run(planned_groups, 2, heads, asked) == [groups] * 2


def test_every_head_is_in_one_group() -> None:
    for query, key in HEADS:
        for groups in (1, 2, 3, 4):
            exchange = exchange_plan(((0, 5), (5, 9)), query, key, 0, groups)
            for share in exchange.heads:
                parts = [share.group(number, exchange.groups) for number in range(exchange.groups)]
                heads = [head for (first, last), _ in parts for head in range(first, last)]
                assert heads == list(range(share.queries))
                for (first, last), (first_key, last_key) in parts:
                    per_key = share.queries // len(share.keys)
                    assert {head // per_key for head in range(first, last)} == set(range(first_key, last_key))


@pytest.mark.parametrize(("ulysses", "groups"), [(2, 2), (4, 2)])
def test_late_transfers_of_groups(pool: Pools, ulysses: int, groups: int) -> None:
    case = Case(DOCS, Mask(), (8, 4), (8, 8), torch.float64, options={"head_groups": groups})
    for found in pool(ulysses).run(errors, case, 1, ulysses, "ulysses", "cpu", "auto"):
        assert max(found.values()) <= 1e-12, found


@pytest.mark.gpu(2)
@pytest.mark.parametrize("transport", ["collective", "copy"])
@pytest.mark.parametrize("heads", [(8, 4), (8, 2)])
def test_late_transfers_of_groups_on_devices(pool: Pools, heads: tuple[int, int], transport: str) -> None:
    case = Case(Documents([700, 33, 1, 500]), Mask(), heads, (64, 64), torch.bfloat16, options={"head_groups": 2})
    for found in pool(2, "cuda").run(errors, case, 1, 2, "ulysses", "cuda", transport, timeout=300):
        assert max(found.values()) <= 5e-3, found


def test_heads_are_parted_where_that_is_predicted_to_be_faster() -> None:
    """Not inside a node, where kernels of fewer heads end less evenly and key gradients are added; over slow links."""
    groups = {}
    for name, machine in (("fast", SHIPPED["H200"].by_copy_engines()), ("slow", with_links(20e9))):
        layout = Layout(Documents([65536]), MeshShape(1, 1, 8))
        plan = plan_attention(layout, Shape(64, 16, 128, 128), machine=machine)
        assert plan.exchange is not None
        assert "heads in" in plan.reason
        groups[name] = plan.exchange.groups
    assert groups["fast"] == 1 < groups["slow"]


def test_a_wrong_number_of_groups_is_refused() -> None:
    layout = Layout(DOCS, MeshShape(1, 1, 2))
    with pytest.raises(ValueError, match=r"head_groups must be None or an integer >= 1, got 0"):
        plan_attention(layout, Shape(4, 4, 128, 128), AttentionOptions(head_groups=0))


def test_groups_go_with_a_ring_of_one_only() -> None:
    """Each would cast the keys of the ring anew, and the backward pass would find those of the last one alone."""
    options = Options(1.0)
    for ring in (1, 2):
        plan = AttentionPlan(
            "local", ring, 0, 9, ((0, 9),), (Stage(()),), (0, 0), (0, 0), exchange_plan(((0, 9),), 4, 2, 0, 2)
        )
        job = Job(plan, (0, 9), options, None, mock.Mock(), False, None, None, torch.device("cpu"), 4, 2)
        with pytest.raises(AssertionError, match="no keys are cast") if ring > 1 else nullcontext():
            assert len(job.groups) == 2
