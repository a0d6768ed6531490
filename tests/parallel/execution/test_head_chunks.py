"""Heads that are computed in chunks, one after another: the same results, and less memory."""

from typing import Any

import pytest
import torch

from ringattn import Documents, Layout, Mask, MeshShape, parallel_attention
from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.parallel.plan.plan import AttentionPlan
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.all_ranks import plan_group
from ringattn.parallel.planning.planner import plan_attention
from ringattn.parallel.pricing.memory import buffer_bytes
from ringattn.settings import AttentionOptions
from tests.dense import Case, dense_attention
from tests.parallel.execution.test_late_transfers import errors
from tests.parallel.ranks import attend
from tests.pool import Pools

DOCS = Documents([40, 5, 1, 0, 23], [0, 40, 45, 46, 50], 75)
SHAPE = Shape(32, 8, 128, 128)
MESHES = [(2, 1, "gather"), (4, 1, "ring"), (4, 1, "joint"), (1, 2, "ulysses"), (2, 2, "hybrid"), (1, 1, "auto")]


@pytest.mark.parametrize(("ring", "ulysses", "scheme"), MESHES)
def test_chunks_change_nothing(pool: Pools, ring: int, ulysses: int, scheme: str) -> None:
    options: list[dict[str, Any]] = [{}, {"keep_keys": True}, {"keep_keys": False, "wide_reduce": False}]
    cases = [
        Case(DOCS, mask, heads, (8, 4), torch.float64, sinks=sinks, dropout=dropout, options=chunks | more)
        for mask, sinks, dropout in ((Mask(), True, None), (Mask(causal=False, window=(9, 4)), False, (0.3, 7)))
        for heads, chunks in (((8, 4), {"head_chunks": 2}), ((4, 4), {"head_chunks": 4}))
        for more in options
    ]
    calls = [(case, ring, ulysses, "zigzag", scheme) for case in cases]
    for case, results in zip(cases, pool(ring * ulysses).run_many(attend, calls), strict=True):
        expected = dense_attention(case)
        for got in results:
            for name, x in expected.items():
                torch.testing.assert_close(got[name], x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("ring", "ulysses", "scheme"), MESHES[:5])
def test_late_transfers_of_chunks(pool: Pools, ring: int, ulysses: int, scheme: str) -> None:
    for keep in (False, True):
        case = Case(DOCS, Mask(), (8, 4), (8, 8), torch.float64, options={"head_chunks": 2, "keep_keys": keep})
        for found in pool(ring * ulysses).run(errors, case, ring, ulysses, scheme, "cpu", "auto"):
            assert max(found.values()) <= 1e-12, found


@pytest.mark.gpu(2)
@pytest.mark.parametrize("transport", ["collective", "copy"])
@pytest.mark.parametrize(("ring", "ulysses", "scheme"), [(2, 1, "gather"), (2, 1, "ring"), (1, 2, "ulysses")])
def test_late_transfers_of_chunks_on_devices(pool: Pools, ring: int, ulysses: int, scheme: str, transport: str) -> None:
    case = Case(Documents([700, 33, 1, 500]), Mask(), (8, 4), (64, 64), torch.bfloat16, options={"head_chunks": 2})
    for found in pool(2, "cuda").run(errors, case, ring, ulysses, scheme, "cuda", transport, timeout=300):
        assert max(found.values()) <= 5e-3, found


def test_a_graph_computes_chunks_too() -> None:
    layout = Layout(DOCS, MeshShape())
    q, k, v = (torch.randn(layout.tokens(), heads, 8, dtype=torch.float64, requires_grad=True) for heads in (8, 4, 4))

    def attention() -> torch.Tensor:
        return parallel_attention(q, k, v, layout, head_chunks=4)

    found, expected = torch.compile(attention, fullgraph=True)(), attention()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for x, y in zip(*(torch.autograd.grad(out.sin().sum(), (q, k, v)) for out in (found, expected)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def planned(degrees: tuple[int, int], heads: tuple[int, int], **options: Any) -> int:
    layout = Layout(DOCS, MeshShape(1, *degrees))
    return plan_attention(layout, Shape(*heads, 128, 128), AttentionOptions(**options)).head_chunks


def test_no_more_chunks_than_key_heads_part_into() -> None:
    assert planned((4, 1), (8, 8)) == 1
    assert [planned((4, 1), (32, 8), head_chunks=asked) for asked in (1, 2, 3, 4, 7, 8, 64)] == [1, 2, 2, 4, 4, 8, 8]
    assert planned((4, 1), (6, 3), head_chunks=2) == 1
    assert [planned((1, 4), (32, 8), head_chunks=asked) for asked in (2, 8)] == [2, 2]
    assert [planned((1, 4), (8, 2), head_chunks=4, wide_reduce=wide) for wide in (True, False)] == [1, 1]
    assert planned((1, 3), (8, 8), head_chunks=2) == 1, "one rank has two heads, others three"


def test_the_reason_says_where_there_are_fewer_chunks_than_were_asked_for() -> None:
    for degrees, asked, told in (((1, 4), 4, "not in 4, as key heads do not part"), ((4, 1), 8, "heads in 8 chunks")):
        reason = plan_attention(Layout(DOCS, MeshShape(1, *degrees)), SHAPE, AttentionOptions(head_chunks=asked)).reason
        assert told in reason


def test_wrong_numbers_of_chunks_are_refused() -> None:
    layout = Layout(DOCS, MeshShape(1, 2))
    with pytest.raises(ValueError, match="head_chunks must be None or an integer >= 1, got 0"):
        plan_group(layout.parts[0], SHAPE, AttentionOptions(head_chunks=0))
    with pytest.raises(ValueError, match="head_chunks must be None or an integer >= 1, got 0"):
        planned((2, 1), (4, 4), head_chunks=0)
    with pytest.raises(ValueError, match="head_groups and head_chunks must not both be above 1, got 2 and 4"):
        planned((1, 2), (4, 4), head_groups=2, head_chunks=4)


@pytest.mark.parametrize("scheme", ["auto", "gather", "ring"])
def test_a_limit_that_whole_heads_do_not_keep_is_kept_in_chunks(scheme: str) -> None:
    layout = Layout(Documents([200_000, 3000, 59_000]), MeshShape(1, 8))

    def planned(**options: Any) -> list[AttentionPlan]:
        asked = AttentionOptions(scheme=scheme, **options)
        return plan_group(layout.parts[0], SHAPE, asked, SHIPPED["H200"].by_copy_engines())

    free = planned(memory_limit=2**34)
    assert {plan.head_chunks for plan in free} == {1}
    least = [max(buffer_bytes(plan, SHAPE) for plan in planned(head_chunks=chunks)) for chunks in (1, 2, 4, 8)]
    assert least == sorted(least, reverse=True)
    assert least[-1] < 0.2 * least[0]
    limit = 3 * least[-1] // 2
    tight = planned(memory_limit=limit)
    (chunks,) = {plan.head_chunks for plan in tight}
    assert chunks > 1
    assert max(buffer_bytes(plan, SHAPE) for plan in tight) <= limit
    assert f"heads in {chunks} chunks, one after another" in tight[0].reason
    with pytest.raises(ValueError, match="memory_limit must leave room for the buffers of a schedule, got 1000 bytes"):
        planned(memory_limit=1000)


def test_keys_are_not_kept_beside_chunks_unless_they_are_asked_for() -> None:
    layout = Layout(Documents([30_000] + [1700] * 200), MeshShape(1, 8))
    asked: list[dict[str, Any]] = [{}, {"head_chunks": 2}, {"head_chunks": 2, "keep_keys": True}]
    asked.append({"head_chunks": 2, "memory_limit": 2**34})
    assert [plan_attention(layout, SHAPE, AttentionOptions(**options)).keep_keys for options in asked] == [
        True,
        False,
        True,
        True,
    ]
