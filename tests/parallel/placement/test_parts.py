"""Parted layouts: some documents exchanged, the others on the ring axis, all of it exact."""

import gc
import weakref
from dataclasses import replace
from functools import cache
from random import Random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringattn import Documents, Layout, Mask, MeshShape, ParallelAttention, parallel_attention
from ringattn.benchmarking.workloads import workload
from ringattn.parallel.choice.degrees import MIXTURE_GAIN, choose_degrees
from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.parallel.placement.parts import Parts
from ringattn.parallel.placement.placement import Placement
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.agreement import common_digest
from ringattn.parallel.planning.planner import plan_attention, plan_parts
from ringattn.parallel.pricing.memory import buffer_bytes
from ringattn.parallel.pricing.pass_times import PassTimes
from ringattn.parallel.pricing.price import overlapped
from ringattn.settings import AttentionOptions
from tests.compiled_layers import compiled_and_not
from tests.dense import Case
from tests.parallel.execution.test_executor import assert_close
from tests.parallel.placement.test_policies import area, assert_every_token_once
from tests.parallel.ranks import attend_on, free_mesh
from tests.pool import Pools
from tests.strategies import HEADS, MASKS, documents, masks

SHAPE = Shape(32, 8, 128, 128)

H200 = SHIPPED["H200"].by_copy_engines()
reuse_pool = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)


@cache
def free_shape(size: int, rank: int = 0) -> MeshShape:
    """A mesh that leaves its degrees to layouts."""
    every = tuple(MeshShape(1, *degrees, rank, machine=H200) for degrees in MeshShape(1, size).parted())
    return replace(every[0], alternatives=every)


@st.composite
def parts_of(draw: st.DrawFn, docs: Documents, size: int) -> Parts:
    """Documents dealt over two or three pairs of degrees of `size` ranks."""
    degrees = draw(st.permutations(MeshShape(1, size).parted()))[: draw(st.integers(1, 3))]
    owner = draw(st.lists(st.integers(0, len(degrees) - 1), min_size=len(docs), max_size=len(docs)))
    return [(pair, [n for n in range(len(docs)) if owner[n] == number]) for number, pair in enumerate(degrees)]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), docs=documents(longest=400, most=12), size=st.sampled_from([2, 4, 6, 8]), mask=masks)
def test_every_token_has_one_place(data: st.DataObject, docs: Documents, size: int, mask: Mask) -> None:
    parts = data.draw(parts_of(docs, size))
    layout = Layout(docs, free_shape(size), mask=mask, parts=parts)
    assert len(layout.parts) == len(parts)
    assert_every_token_once(layout)
    assert layout.mesh is (free_shape(size) if len(parts) > 1 else layout.parts[0].mesh)
    x = torch.arange(docs.total)
    whole = Layout(docs, MeshShape())
    positions = torch.empty_like(x)
    positions[whole.indices()] = whole.position_ids()
    for rank in range(size):
        local = Layout(docs, free_shape(size, rank), mask=mask, parts=parts)
        assert local.ranges() == layout.ranges(rank)
        assert local.tokens() == len(local.indices()) == layout.tokens(rank)
        assert torch.equal(local.shard(x), local.indices())
        assert torch.equal(local.indices(), torch.cat([indices_of(part, rank) for part in local.parts]))
        assert torch.equal(local.position_ids(), positions[local.indices()])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.1, 0.9), padding=st.sampled_from([0, 5000]))
def test_parts_are_balanced_and_so_is_their_sum(seed: int, share: float, padding: int) -> None:
    random, size, lengths = Random(seed), 8, []
    while sum(lengths) < 2**18:
        lengths.append(int(2 ** random.uniform(5, 15)))
    docs = Documents(lengths, total=sum(lengths) + padding)
    exchanged = [number for number, length in enumerate(lengths) if random.random() < share]
    others = sorted({*range(len(lengths))} - {*exchanged})
    layout = Layout(docs, free_shape(size), "balanced", parts=[((1, 8), exchanged), ((8, 1), others)])
    tokens = [layout.tokens(rank) for rank in range(size)]
    assert max(tokens) - min(tokens) <= 4 * 128 + 1
    costs = [area(layout.parts[1], rank) for rank in range(size)]  # what is exchanged is dealt by heads
    everything = area(Layout(docs, MeshShape()), 0)
    # Four cuts that are rounded to 128 of a rank's 2^15 rows move 1.6 % of them; late rows cost twice the mean.
    assert max(costs) - sum(costs) / size <= 0.03 * everything / size


def times(compute: float, waiting: float, lost: float) -> PassTimes:
    """Of one position whose host is never waited for."""
    return PassTimes(*(np.array([x]) for x in (compute, 0.0, waiting, lost, 0.0)))


def test_what_a_part_hides_of_the_other_disturbs_its_kernels() -> None:
    # All of the first's second travels under the other's kernels, and half of the other's four seconds under its own.
    both = overlapped(times(2, 1, 0.5), times(10, 4, 2))
    assert (both.compute, both.exposed) == (12 + 0.5 + 1, 2)
    assert overlapped(times(2, 0, 0), times(10, 0, 0)).seconds == 12


def test_without_disturbance_a_mixture_is_predicted_to_be_faster() -> None:
    quiet = replace(H200, links={key: replace(link, disturbance=0.0) for key, link in H200.links.items()})
    every = tuple(replace(mesh, machine=quiet) for mesh in free_shape(8).alternatives)
    docs, mesh = workload("packed256k", 3).docs, replace(every[0], alternatives=every)
    assert len(Layout(docs, mesh).parts) == 2
    assert len(Layout(docs, free_shape(8)).parts) == 1


def test_a_mixture_beats_gather_and_ulysses_where_a_pack_mixes_both() -> None:
    for name in ("hist256k", "short256k"):
        docs = workload(name, 3).docs
        layout = Layout(docs, free_shape(8))
        assert [(part.mesh.ring, part.mesh.ulysses) for part in layout.parts] == [(1, 8), (8, 1)]
        assert min(layout.parts[0].docs.lengths) >= max(layout.parts[1].docs.lengths)
        assert "documents (of" in layout.reason
        alone = seconds_of(docs, (8, 1)), seconds_of(docs, (1, 8))
        both = choose_degrees(
            layout.mesh.alternatives,
            lambda mesh, docs=docs: Layout(docs, mesh).parts[0],
            ((Mask(), 1.0),),
            SHAPE,
            H200,
            lambda parts, docs=docs: Layout(docs, free_shape(8), parts=parts).parts,
        )
        assert both.seconds < (1 - MIXTURE_GAIN) * min(alone)
        assert [part.docs for part in both.parts] == [part.docs for part in layout.parts]


def test_several_nodes_exchange_inside_each() -> None:
    every = tuple(MeshShape(1, *degrees, machine=H200) for degrees in MeshShape(1, 32).parted(8))
    layout = Layout(workload("hist1024k", 3).docs, replace(every[0], alternatives=every))
    assert [(part.mesh.ring, part.mesh.ulysses) for part in layout.parts] == [(4, 8), (32, 1)]
    assert_every_token_once(layout)


def seconds_of(docs: Documents, degrees: tuple[int, int]) -> float:
    (mesh,) = [mesh for mesh in free_shape(8).alternatives if (mesh.ring, mesh.ulysses) == degrees]
    return choose_degrees([mesh], lambda mesh: Layout(docs, mesh).parts[0], ((Mask(), 1.0),), SHAPE, H200).seconds


@pytest.mark.parametrize("lengths", [[262_144], [300] * 40, [0, 0], []])
def test_one_kind_of_documents_stays_on_one_mesh(lengths: list[int]) -> None:
    assert len(Layout(Documents(lengths), free_shape(8)).parts) == 1


def test_a_policy_that_was_asked_for_is_kept() -> None:
    docs = workload("hist256k", 3).docs
    assert len(Layout(docs, free_shape(8), "zigzag").parts) == 1
    assert len(Layout(docs, free_shape(8), "balanced").parts) == 2


def test_every_rank_plans_the_same() -> None:
    docs = workload("hist256k", 3).docs
    layouts = [Layout(docs, free_shape(8, rank)) for rank in range(8)]
    plans = [plan_parts(layout, SHAPE) for layout in layouts]
    assert len({layout.reason for layout in layouts}) == 1
    assert len({common_digest(plan, layout) for plan, layout in zip(plans, layouts, strict=True)}) == 1
    for layout, plan in zip(layouts, plans, strict=True):
        assert plan is plan_parts(layout, SHAPE)
        assert [rows for rows, _ in plan.parts] == [
            (0, layout.parts[0].tokens(layout.mesh.sequence_rank)),
            (layout.parts[0].tokens(layout.mesh.sequence_rank), layout.tokens()),
        ]
        assert "rows 0-" in str(plan)
        assert "in 2 parts" in str(layout)


def test_the_memory_of_all_parts_is_limited() -> None:
    layout = Layout(workload("hist256k", 3).docs, free_shape(8))
    needed = [buffer_bytes(plan, SHAPE) for _, plan in plan_parts(layout, SHAPE).parts]
    plan_parts(layout, SHAPE, AttentionOptions(memory_limit=2 * sum(needed)))
    with pytest.raises(ValueError, match=r"memory_limit=\d+ for all parts"):
        plan_parts(layout, SHAPE, AttentionOptions(memory_limit=needed[0] + 2**16))


def test_wrong_parts_are_named() -> None:
    docs = Documents([100, 50, 20])
    with pytest.raises(ValueError, match="parts needs a mesh that leaves its degrees"):
        Layout(docs, MeshShape(1, 2), parts=[((2, 1), [0, 1, 2])])
    with pytest.raises(ValueError, match=r"parts must name \(ring, ulysses\) of the mesh.*\(4, 1\)"):
        Layout(docs, free_shape(2), parts=[((4, 1), [0, 1, 2])])
    with pytest.raises(ValueError, match=r"each of the 3 documents exactly once, got 3 entries; wrong are \[1, 2\]"):
        Layout(docs, free_shape(2), parts=[((2, 1), [0, 1]), ((1, 2), [1])])
    with pytest.raises(ValueError, match=r"each \(ring, ulysses\) once, got \[\(2, 1\), \(2, 1\)\]"):
        Layout(docs, free_shape(2), parts=[((2, 1), [0, 1]), ((2, 1), [2])])
    with pytest.raises(ValueError, match="speeds"):
        Layout(docs, free_shape(2), parts=[((2, 1), [0, 1, 2])], speeds=[1.0, 2.0])
    layout = Layout(docs, free_shape(2), parts=[((2, 1), [1, 2]), ((1, 2), [0])])
    with pytest.raises(ValueError, match='scheme must be "auto"'):
        plan_parts(layout, Shape(4, 2, 128, 128), AttentionOptions(scheme="ring"))
    with pytest.raises(ValueError, match="plan_parts plans each of its 2 parts"):
        plan_attention(layout, Shape(4, 2, 128, 128))


def indices_of(part: Placement, rank: int) -> torch.Tensor:
    return torch.cat([torch.arange(0), *(torch.arange(*span) for span in part.ranges(rank))])


def attend(case: Case, size: int, parts: Parts) -> dict[str, torch.Tensor]:
    return attend_on(Layout(case.docs, free_mesh(size), mask=case.mask, parts=parts), case, "auto")


@pytest.mark.parametrize("size", [2, 4])
@settings(reuse_pool, max_examples=3)
@given(data=st.data(), docs=documents(), heads=st.permutations(HEADS), seed=st.integers(0, 1000))
def test_every_mask_is_exact(
    pool: Pools, size: int, data: st.DataObject, docs: Documents, heads: list, seed: int
) -> None:
    cases = [Case(docs, mask, heads[index % 3], seed=seed) for index, mask in enumerate(MASKS)]
    jobs = [(case, size, data.draw(parts_of(docs, size))) for case in cases]
    for case, results in zip(cases, pool(size).run_many(attend, jobs), strict=True):
        assert_close(results, case)


@pytest.mark.parametrize("size", [2, 4])
@settings(reuse_pool, max_examples=40)
@given(data=st.data())
def test_random_combinations_are_exact(pool: Pools, size: int, data: st.DataObject) -> None:
    case = Case(
        docs=data.draw(documents()),
        mask=data.draw(masks),
        heads=data.draw(st.sampled_from([*HEADS, (5, 5), (7, 1), (6, 3)])),
        dims=data.draw(st.sampled_from([(8, 8), (8, 4), (3, 5)])),
        softcap=data.draw(st.sampled_from([0.0, 2.0])),
        sinks=data.draw(st.booleans()),
        dropout=data.draw(st.sampled_from([None, (0.3, 5)])),
        seed=data.draw(st.integers(0, 1000)),
        options={"keep_keys": data.draw(st.sampled_from([None, True])), "return_lse": data.draw(st.booleans())},
    )
    assert_close(pool(size).run(attend, case, size, data.draw(parts_of(case.docs, size))), case)


def compiled(size: int, sinks: bool) -> tuple[list, int]:
    """Over layouts with parts and without."""
    mesh = free_mesh(size)
    layouts = [
        Layout(Documents([40, 3, 21]), mesh, parts=[((1, size), [0]), ((size, 1), [1, 2])]),
        Layout(Documents([64]), mesh.alternatives[0]),
        Layout(Documents([13, 80, 7], total=105), mesh, parts=[((size, 1), [0, 2]), ((1, size), [1])]),
        Layout(Documents([90, 10, 30]), mesh, parts=[((1, size), [0, 1]), ((2, size // 2), [2])]),
    ]
    logits = torch.nn.Parameter(torch.randn(4, dtype=torch.float64)) if sinks else None
    return compiled_and_not(layouts, ParallelAttention(mesh, sinks=logits))


@pytest.mark.parametrize("sinks", [False, True])
def test_a_compiled_layer_is_exact(pool: Pools, sinks: bool) -> None:
    for pairs, graphs in pool(4).run(compiled, 4, sinks):
        assert graphs <= 2
        for eager, fast in pairs:
            for a, b in zip(eager, fast, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def forgotten(size: int) -> bool:
    """Whether the graph of an attention goes with its output, which parts saved views of."""
    layout = Layout(Documents([40, 3, 21]), free_mesh(size), parts=[((1, size), [0]), ((size, 1), [1, 2])])
    q, k, v = (torch.randn(layout.tokens(), heads, 8, requires_grad=True) for heads in (4, 2, 2))
    out = parallel_attention(q, k, v, layout)
    graph = weakref.ref(out.grad_fn)
    del out
    gc.collect()
    return graph() is None


def test_no_cycle_keeps_what_was_saved(pool: Pools) -> None:
    assert pool(2).run(forgotten, 2) == [True, True]


def unsharded(size: int) -> None:
    docs = Documents([40, 3, 21], total=70)
    layout = Layout(docs, free_mesh(size), parts=[((1, size), [0, 1]), ((size, 1), [2])])
    x = torch.randn(70, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    whole = layout.unshard(layout.shard(x))
    assert torch.equal(whole, x)
    whole.square().sum().backward()
    grad = x.grad.clone()
    dist.all_reduce(grad)
    assert torch.equal(grad, 2 * x.detach())


def test_shards_of_parts_come_back(pool: Pools) -> None:
    pool(4).run(unsharded, 4)
