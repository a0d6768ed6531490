"""The stated memory: with the message buffers of copy engines, where those move the data and only there."""

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ringattn import Documents, Layout, Mask, MeshShape, init_mesh, parallel_attention
from ringattn.parallel.execution.executor import run
from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.parallel.placement.pieces import PieceTable
from ringattn.parallel.plan.plan import AttentionPlan
from ringattn.parallel.plan.route import Route
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.all_ranks import plan_group
from ringattn.parallel.planning.planner import plan_attention
from ringattn.parallel.pricing.memory import StageRows, buffer_bytes, largest_messages
from ringattn.parallel.pricing.price import most_bytes
from ringattn.parallel.pricing.pricer import Pricer
from ringattn.parallel.pricing.setting import PriceInputs
from ringattn.parallel.schedules.candidates import candidates
from ringattn.parallel.schedules.demand import KeyDemand
from ringattn.parallel.transport.buffers import SMALLEST, half_bytes, message_buffers
from ringattn.parallel.transport.protocol import Transport
from ringattn.preparation import prepare
from ringattn.settings import AttentionOptions
from tests.parallel.choice.test_schedule import with_links
from tests.parallel.pricing.tensors_alive import left_before_results, most_alive, most_of_exchange
from tests.parallel.ranks import mesh_of
from tests.pool import Pools
from tests.strategies import documents, masks

H200 = SHIPPED["H200"]
COPY = H200.by_copy_engines()
SHAPE = Shape(32, 8, 128, 128)
PACKED = Documents([131_072, 32_768, 32_768, 16_384, 16_384, 8192, 8192, 4096, 4096, 2048, 2048, 1024, 1024, 2048])
SMALL = Documents([40, 5, 1, 0, 23], [0, 40, 45, 46, 50], 75)


def test_buffers_are_powers_of_two_from_a_mebibyte_on() -> None:
    assert [half_bytes(size) for size in (1, SMALLEST, SMALLEST + 1, 2**24, 2**24 + 1)] == [
        *(2**20, 2**20, 2**21, 2**24, 2**25)
    ]
    assert [message_buffers(size) for size in (0, 1, 2**24)] == [0, 2**21, 2**25]


class Counting:
    """A transport that notes its largest message."""

    def __init__(self, inner: Transport) -> None:
        self.inner, self.name, self.reason, self.most = inner, inner.name, inner.reason, 0

    def buffer(self, route: Route, like: Tensor) -> Tensor:
        return self.inner.buffer(route, like)

    def message(self, x: Tensor, route: Route) -> Tensor:
        return self.inner.message(x, route)

    def exchange(self, send: Tensor, receive: Tensor, route: Route) -> Any:
        self.most = max(self.most, route.most * send.element_size())
        return self.inner.exchange(send, receive, route)


def messages(ring: int, ulysses: int, heads: tuple[int, int], options: dict[str, Any]) -> list[tuple[int, int]]:
    """Bytes of the largest message on each axis: of a forward and a backward pass, and as stated."""
    layout = Layout(SMALL, mesh_of(ring, ulysses))
    (query, key), dims = heads, (8, 4)
    shapes = (query, dims[0]), (key, dims[0]), (key, dims[1])
    q, k, v = (torch.randn(layout.tokens(), *shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
    (job,) = prepare(q, k, v, None, layout, AttentionOptions(backend="reference", **options))
    axes = {"ring": job.ring and Counting(job.ring), "ulysses": job.ulysses and Counting(job.ulysses)}
    out, _ = run([replace(job, **axes)], q, k, v, None)
    out.float().sum().backward()
    stated = largest_messages(job.plan, Shape(query, key, *dims))
    return [(counting.most, stated[axis]) for axis, counting in axes.items() if counting is not None]


@pytest.mark.parametrize("degrees", [(4, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("heads", [(8, 2), (8, 8), (6, 3)])
def test_the_largest_messages_are_those_that_are_sent(
    pool: Pools, degrees: tuple[int, int], heads: tuple[int, int]
) -> None:
    options: list[dict[str, Any]] = [{}, {"wide_reduce": False}, {"keep_keys": True}, {"head_chunks": 2}]
    if degrees[0] == 1:
        options.append({"head_groups": 2})
    for found in pool(4).run_many(messages, [(*degrees, heads, one) for one in options]):
        for sent, stated in (pair for rank in found for pair in rank):
            assert sent == stated


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("scheme", ["gather", "joint", "ring"])
@settings(max_examples=15)
@given(
    docs=documents(longest=1000, most=6),
    mask=masks,
    policy=st.sampled_from(["zigzag", "balanced", "contiguous"]),
    keep_keys=st.booleans(),
    wide=st.booleans(),
    engines=st.booleans(),
)
def test_no_more_is_alive_than_is_stated(
    scheme: str, chunks: int, docs: Documents, mask: Mask, policy: str, keep_keys: bool, wide: bool, engines: bool
) -> None:
    """Beside the lse, and what kernels hold themselves."""
    shape, machine = Shape(8, 8, 64, 32), H200.by_copy_engines(ring=engines)
    options = AttentionOptions(mask, scheme=scheme, keep_keys=keep_keys, wide_reduce=wide, head_chunks=chunks)
    for rank in range(4):
        layout = Layout(docs, MeshShape(1, 4, 1, rank), policy, mask)
        plan = plan_attention(layout, shape, options, machine)
        rows, own = StageRows.of(plan), plan.own(shape)
        forward, backward = most_alive(plan, shape)
        lse = 4 * own.query_heads * plan.rows
        assert forward <= rows.forward_bytes(own, keep_keys) + lse
        assert backward <= rows.backward_bytes(own, keep_keys, wide) + 16  # a zero that is written to rows


@pytest.mark.parametrize("engines", [False, True])
def test_an_exchange_lets_go_of_what_it_has_computed_from(engines: bool) -> None:
    """Of a token, inputs, results and gradients are 160 heads. Beside them q, k, v and out of the position's tokens are
    kept, 80. Last, gradients have come, 48, to be put in their places, and NCCL's message is still there, 48."""
    machine = H200.by_copy_engines(ulysses=engines)
    plan = plan_attention(Layout(Documents([16_000]), MeshShape(1, 1, 2)), SHAPE, machine=machine)
    found = most_of_exchange(plan, SHAPE)
    assert found == pytest.approx((160 + 80 + 48 + (0 if engines else 48)) / 160)


@pytest.mark.parametrize(("heads", "groups"), [((32, 8), 1), ((32, 8), 2), ((32, 8), 4), ((32, 1), 1), ((32, 1), 2)])
def test_messages_alone_are_alive_when_an_exchange_makes_its_gradients(heads: tuple[int, int], groups: int) -> None:
    """Also with several groups of heads, and with copies of key heads whose gradients are summed in float32."""
    layout = Layout(Documents([16_000]), MeshShape(1, 1, 2))
    plan = plan_attention(layout, Shape(*heads, 128, 128), AttentionOptions(head_groups=groups), H200)
    assert plan.exchange is not None
    assert (plan.exchange.groups, plan.sums_copies) == (groups, heads[1] == 1)
    alive, messages = left_before_results(plan, Shape(*heads, 128, 128))
    assert alive == messages > 0


def planned(degrees: tuple[int, int], machine: Any, scheme: str = "auto", **options: Any) -> AttentionPlan:
    layout = Layout(PACKED, MeshShape(1, *degrees))
    return plan_attention(layout, SHAPE, AttentionOptions(scheme=scheme, **options), machine)


@pytest.mark.parametrize(
    ("degrees", "scheme"), [((8, 1), "gather"), ((8, 1), "ring"), ((2, 4), "gather"), ((1, 8), "auto")]
)
def test_message_buffers_are_counted_where_engines_copy_and_only_there(degrees: tuple[int, int], scheme: str) -> None:
    for axes in ((), ("ring",), ("ulysses",), ("ring", "ulysses")):
        machine = H200.by_copy_engines(ring="ring" in axes, ulysses="ulysses" in axes)
        plan = planned(degrees, machine, scheme, keep_keys=False)
        bare = replace(plan, engines=())
        largest = largest_messages(plan, SHAPE)
        held = sum(2 * half_bytes(largest[axis]) for axis in axes if largest[axis])
        assert plan.engines == axes
        # A message that is sent out of them is not counted a second time.
        assert buffer_bytes(bare, SHAPE) + held - 2 * largest["ring"] <= buffer_bytes(plan, SHAPE)
        assert buffer_bytes(plan, SHAPE) <= buffer_bytes(bare, SHAPE) + held
        if axes == ("ulysses",):
            assert buffer_bytes(plan, SHAPE) == buffer_bytes(bare, SHAPE) + held


def test_what_sends_nothing_needs_no_message_buffers() -> None:
    layout = Layout(Documents([100] * 8), MeshShape(1, 2), "balanced")
    plan = plan_attention(layout, SHAPE, AttentionOptions(scheme="gather"), COPY)
    assert plan.sent_rows == plan.received_rows == 0
    assert buffer_bytes(plan, SHAPE) == 0


@settings(max_examples=60)
@given(
    docs=documents(longest=3000, most=8),
    mask=masks,
    degrees=st.sampled_from([(2, 1), (3, 2), (7, 1), (1, 5), (2, 8)]),
    axes=st.sampled_from([(True, True), (False, True), (True, False)]),
    keep_keys=st.sampled_from([None, False, True]),
    wide=st.booleans(),
    limit=st.sampled_from([2**21, 3 * 2**20, 2**22, 5 * 2**20, 2**23, 2**24, 2**26, None]),
)
def test_no_rank_needs_more_than_all_reckon_with(
    docs: Documents,
    mask: Mask,
    degrees: tuple[int, int],
    axes: tuple[bool, bool],
    keep_keys: bool | None,
    wide: bool,
    limit: int | None,
) -> None:
    machine = H200.by_copy_engines(*axes)
    layout = Layout(docs, MeshShape(1, *degrees), "contiguous", mask)
    with contextlib.suppress(ValueError):  # the limit is too small
        options = AttentionOptions(mask, keep_keys=keep_keys, wide_reduce=wide, memory_limit=limit)
        plans = plan_group(layout.parts[0], SHAPE, options, machine)
        for plan in plans:
            assert limit is None or buffer_bytes(plan, SHAPE) <= limit


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("keep_keys", [False, True])
@pytest.mark.parametrize("scheme", ["gather", "joint", "ring"])
def test_prices_state_what_plans_do(scheme: str, keep_keys: bool, chunks: int) -> None:
    layout = Layout(PACKED, MeshShape(1, 4, 2))
    setting = PriceInputs(COPY, SHAPE, keep_keys=keep_keys, head_chunks=chunks).on(layout.parts[0])
    options = AttentionOptions(scheme=scheme, keep_keys=keep_keys, head_chunks=chunks)
    plans = plan_group(layout.parts[0], SHAPE, options, COPY)
    assert {plan.head_chunks for plan in plans} == {chunks}
    stated = max(buffer_bytes(plan, SHAPE) for plan in plans)
    pricer = Pricer(KeyDemand.of(PieceTable.of(layout.parts[0], Mask()), Mask().band), setting)
    prices = pricer.price(candidates(4, scheme, None)[0])
    assert stated <= most_bytes(prices) <= 1.2 * stated


def test_a_limit_counts_message_buffers() -> None:
    layouts = [Layout(Documents([65_536]), MeshShape(1, 8, 1, rank), "balanced") for rank in range(8)]
    options = AttentionOptions(scheme="gather", keep_keys=False, head_chunks=1)

    def most(machine: Machine) -> int:
        plans = [plan_attention(layout, SHAPE, options, machine) for layout in layouts]
        return max(buffer_bytes(plan, SHAPE) for plan in plans)

    limit, stated = most(H200), most(COPY)
    tight = options._replace(memory_limit=limit + 2**21)
    plan_attention(layouts[0], SHAPE, tight, H200)
    with pytest.raises(ValueError, match="memory_limit must leave room"):
        plan_attention(layouts[0], SHAPE, tight, COPY)
    assert stated > limit + 2**21
    plan_attention(layouts[0], SHAPE, options._replace(memory_limit=stated + 2**21), COPY)


def test_messages_of_engines_are_no_other_memory() -> None:
    plan = planned((8, 1), COPY, "ring", keep_keys=False)
    rows, own = StageRows.of(plan), SHAPE
    assert rows.engines
    assert rows.forward_bytes(own, False) <= replace(rows, engines=False).forward_bytes(own, False)
    assert rows.backward_bytes(own, False, True) < replace(rows, engines=False).backward_bytes(own, False, True)


def test_the_message_buffers_of_one_pass_are_there_in_the_other() -> None:
    """Each pass alone keeps the limit, but not the one with the messages of the other: one schedule does both."""
    machine = with_links(834e9).by_copy_engines()
    layouts = [Layout(Documents([7260]), MeshShape(1, 4, 1, rank), "contiguous") for rank in range(4)]
    options = AttentionOptions(keep_keys=False, memory_limit=160 << 20, head_chunks=1)
    plans = [plan_attention(layout, SHAPE, options, machine) for layout in layouts]
    assert all(plan.backward is None and "both passes" in plan.reason for plan in plans)
    assert max(buffer_bytes(plan, SHAPE) for plan in plans) <= 160 << 20


def held(ring: int, ulysses: int) -> list[tuple[int, int]]:
    """Bytes of the message buffers of each axis after a forward and a backward pass, and as stated."""
    mesh = init_mesh(ring=ring, ulysses=ulysses, device_type="cuda", transport="copy")
    layout = Layout(Documents([5000, 30, 9000]), mesh, "zigzag")
    shapes = ((8, 128), (4, 128), (4, 128))
    q, k, v = (
        torch.randn(layout.tokens(), *shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for shape in shapes
    )
    parallel_attention(q, k, v, layout).sum().backward()
    torch.cuda.synchronize()
    plan = plan_attention(layout, Shape(8, 4, 128, 128))
    assert plan.engines == ("ring", "ulysses")
    stated = largest_messages(plan, Shape(8, 4, 128, 128))
    axes = {"ring": mesh.ring_transport} if ring > 1 else {"ulysses": mesh.ulysses_transport}
    return [(2 * transport._memory.half, message_buffers(stated[axis])) for axis, transport in axes.items()]  # type: ignore[attr-defined]


@pytest.mark.gpu(2)
@pytest.mark.parametrize("degrees", [(2, 1), (1, 2)])
def test_engines_hold_what_is_stated(pool: Pools, degrees: tuple[int, int]) -> None:
    for pairs in pool(2, "cuda").run(held, *degrees, timeout=300):
        assert all(found == stated > 2 * SMALLEST for found, stated in pairs)


def test_sums_of_copied_heads_are_counted() -> None:
    """Gradients of a key head on several ranks are sums of all rows, and lie in a message once more."""
    layout = Layout(Documents([5000, 300]), MeshShape(1, 1, 8))
    wide, narrow = (
        plan_attention(layout, Shape(8, 2, 128, 128), AttentionOptions(wide_reduce=wide)) for wide in (True, False)
    )
    shape = Shape(8, 2, 128, 128)
    own = shape.share(wide.exchange)
    assert buffer_bytes(wide, shape) - buffer_bytes(narrow, shape) == 2 * wide.rows * own.wide_key_row_bytes
