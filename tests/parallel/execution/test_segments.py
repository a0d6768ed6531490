"""Attention over trees and blocks against one dense computation in float64, in one process and on processes."""

from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringattn import Documents, Mask
from ringattn.kernels.backends.reference import Reference
from ringattn.kernels.merge import merge_
from ringattn.kernels.spec import Grads, Options, SavedCall
from ringattn.parallel.layout import Layout
from ringattn.parallel.plan.plan import AttentionPlan
from ringattn.parallel.schedules import demand
from tests.dense import Case
from tests.parallel.execution.test_executor import MESHES, PLACES, assert_close, attend_some
from tests.parallel.planning.brute_force import plans_of
from tests.parallel.ranks import attend
from tests.pool import Pools
from tests.strategies import HEADS, segment_masks, segmented_documents

POLICIES = ("contiguous", "zigzag", "balanced")
TREE = Documents.from_tree(
    [40, 20, 13, 9, 30, 25, 1, 17], [-1, 0, 1, 1, 0, -1, -1, 6], blocks=[(3, 11), (44, 58), (120, 137)], total=160
)
TREE_MASKS = (
    Mask(),
    Mask(window=(5, 0)),
    Mask(window=(12, 0), blocks="clipped"),
    Mask(window=(30, -1)),
)
reuse_pool = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)


def keys_of(layout: Layout, plan: AttentionPlan, stage: int) -> torch.Tensor:
    """Global index of each key row that a stage reads."""
    index = plan.index if stage == 0 else plan.stages[stage].index
    return torch.cat([torch.arange(0), *(torch.arange(*span) for span in index)])


def played(plans: list[tuple[Layout, AttentionPlan]], case: Case) -> dict[str, torch.Tensor]:
    """What all ranks compute together, one call after another, with keys put where the plans say."""
    x, backend, options = case.tensors(), Reference(), Options(case.dims[0] ** -0.5)
    out, lse = torch.zeros_like(x["dout"]), x["q"].new_full((case.heads[0], case.docs.total), float("-inf"))
    grads = {f"d{name}": torch.zeros_like(x[name]) for name in ("q", "k", "v")}
    steps = []
    for layout, plan in plans:
        queries = layout.indices()
        own_out, own_lse = torch.zeros_like(x["dout"][queries]), lse[:, queries]
        for number, stage in enumerate(plan.stages):
            keys = keys_of(layout, plan, number)
            for call in stage.calls:
                q_rows, k_rows = queries[slice(*call.q)], keys[slice(*call.k)]
                tensors = x["q"][q_rows], x["k"][k_rows], x["v"][k_rows]
                part = torch.empty_like(x["dout"][q_rows])
                part_lse = backend.forward(*tensors, call, options, part)
                merge_(own_out[slice(*call.q)], own_lse[:, slice(*call.q)], part, part_lse)
                steps.append((q_rows, k_rows, tensors, call))
        out[queries], lse[:, queries] = own_out, own_lse
    for q_rows, k_rows, tensors, call in steps:
        found = Grads(*(torch.zeros_like(tensor) for tensor in tensors))
        saved = SavedCall(*tensors, out[q_rows], lse[:, q_rows], call, options)
        backend.backward(x["dout"][q_rows], saved, found)
        for name, rows, part in zip(("dq", "dk", "dv"), (q_rows, k_rows, k_rows), found, strict=True):
            grads[name].index_add_(0, rows, part)
    return {"out": out, "lse": lse} | grads


@settings(max_examples=30, deadline=None)
@given(
    docs=segmented_documents(),
    mask=segment_masks,
    ring=st.sampled_from([1, 2, 4]),
    policy=st.sampled_from(POLICIES),
    scheme=st.sampled_from(["gather", "joint", "ring"]),
    repeated=st.sampled_from([0, 10_000]),
    seed=st.integers(0, 1000),
)
def test_all_ranks_in_one_process_are_exact(
    docs: Documents, mask: Mask, ring: int, policy: str, scheme: str, repeated: int, seed: int
) -> None:
    case = Case(docs, mask, (2, 1), (4, 4), seed=seed)
    with mock.patch.object(demand, "REPEATED", repeated):
        plans = plans_of(docs, mask, ring, policy, scheme if ring > 1 else "auto", None)
    assert_close([played(plans, case)], case)


@pytest.mark.parametrize(("ring", "ulysses", "scheme", "policy"), PLACES)
def test_every_schedule_and_layout_is_exact(pool: Pools, ring: int, ulysses: int, scheme: str, policy: str) -> None:
    cases = [Case(TREE, mask, HEADS[index % 3], seed=index) for index, mask in enumerate(TREE_MASKS)]
    jobs = [(case, ring, ulysses, policy, scheme) for case in cases]
    for case, results in zip(cases, pool(ring * ulysses).run_many(attend, jobs), strict=True):
        assert_close(results, case)


@pytest.mark.parametrize("world", [1, 2, 4])
@settings(reuse_pool, max_examples=15)
@given(data=st.data())
def test_random_trees_on_processes_are_exact(pool: Pools, world: int, data: st.DataObject) -> None:
    ring, ulysses, scheme = data.draw(st.sampled_from([mesh for mesh in MESHES if mesh[0] * mesh[1] == world]))
    case = Case(
        docs=data.draw(segmented_documents(longest=25)),
        mask=data.draw(segment_masks),
        heads=data.draw(st.sampled_from([*HEADS, (5, 5), (6, 3)])),
        dims=data.draw(st.sampled_from([(8, 8), (8, 4)])),
        softcap=data.draw(st.sampled_from([0.0, 2.0])),
        sinks=data.draw(st.booleans()),
        dropout=data.draw(st.sampled_from([None, (0.3, 5)])),
        seed=data.draw(st.integers(0, 1000)),
        options={"keep_keys": data.draw(st.sampled_from([None, False, True]))},
    )
    policy = data.draw(st.sampled_from(POLICIES))
    assert_close(pool(world).run(attend, case, ring, ulysses, policy, scheme), case)


def attend_sharing(case: Case, policy: str, scheme: str) -> dict[str, torch.Tensor]:
    """With keys that branches share in the buffer, as if they were many."""
    with mock.patch.object(demand, "REPEATED", 0):
        return attend(case, 4, 1, policy, scheme)


@pytest.mark.parametrize("scheme", ["gather", "joint"])
def test_branches_that_share_keys_are_exact(pool: Pools, scheme: str) -> None:
    cases = [Case(TREE, mask, HEADS[1]) for mask in TREE_MASKS]
    jobs = [(case, "balanced", scheme) for case in cases]
    for case, results in zip(cases, pool(4).run_many(attend_sharing, jobs), strict=True):
        assert_close(results, case)


@pytest.mark.parametrize(("ring", "ulysses", "scheme"), [(4, 1, "gather"), (4, 1, "ring"), (2, 2, "hybrid")])
def test_unseen_keys_get_exactly_zero_gradient(pool: Pools, ring: int, ulysses: int, scheme: str) -> None:
    mask = Mask(window=(25, 0))
    case = Case(TREE, mask, (4, 2), dtype=torch.float32)
    for queries in (slice(75, 80), slice(46, 50), slice(85, 112)):  # of a branch, in a block, of a second child
        seen = TREE.dense(mask)[queries].any(0)
        for got in pool(ring * ulysses).run(attend_some, case, queries, ring, ulysses, "balanced", scheme):
            for name in ("dk", "dv"):
                assert (got[name][~seen] == 0).all()
                assert (got[name][seen] != 0).any(-1).all()


@pytest.mark.parametrize(("ring", "ulysses", "scheme"), [(1, 1, "auto"), (2, 1, "gather"), (2, 2, "hybrid")])
def test_cpu_flash_in_float32(pool: Pools, ring: int, ulysses: int, scheme: str) -> None:
    for mask in TREE_MASKS:
        case = Case(TREE, mask, (6, 2), (32, 32), torch.float32, options={"backend": "cpu"})
        assert_close(pool(ring * ulysses).run(attend, case, ring, ulysses, "balanced", scheme), case, 2e-6)
