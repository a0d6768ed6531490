"""Layouts and plans that another process made are those that this one would make, on this one's mesh."""

import pickle
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn import Documents, Layout, Mask, MeshShape, parallel_attention
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning import planner
from ringattn.parallel.planning.ahead import Attention, attentions_of, from_bytes, install, plan_ahead, to_bytes
from ringattn.parallel.planning.planner import plan_parts
from ringattn.settings import AttentionOptions
from tests.dense import Case
from tests.parallel.ranks import attend_on, free_mesh, mesh_of
from tests.pool import Pools
from tests.strategies import documents, masks

SHAPE = Shape(4, 2, 128, 128)


def mesh_with_alternatives() -> MeshShape:
    others = tuple(MeshShape(1, ring, 4 // ring, 1) for ring in (4, 2, 1))
    return MeshShape(1, 4, 1, 1, alternatives=others)


@settings(max_examples=40, deadline=None)
@given(documents(), masks, st.sampled_from([(4, 1), (2, 2), (1, 4)]))
def test_what_arrives_is_what_was_sent(docs: Documents, mask: Mask, degrees: tuple[int, int]) -> None:
    mesh = MeshShape(1, *degrees, 1)
    layout = Layout(docs, MeshShape(1, *degrees, 1), mask=mask)
    asked = Attention(SHAPE, AttentionOptions(mask).for_planning())
    arrived, plans = from_bytes(to_bytes((layout, plan_ahead(layout, [asked]))), mesh)
    assert arrived.mesh is mesh
    assert all(part.mesh is mesh for part in arrived.parts)
    assert arrived.indices().equal(layout.indices())
    install(arrived, plans)
    with mock.patch.object(planner, "_plans", side_effect=AssertionError("planned again")):
        found = plan_parts(arrived, SHAPE, AttentionOptions(mask))
    assert found == plan_parts(Layout(docs, mesh, mask=mask), SHAPE, AttentionOptions(mask))
    assert attentions_of(arrived) == (asked,)


def test_parts_arrive_on_the_meshes_of_their_degrees() -> None:
    docs, mesh = Documents([900, 20, 30]), mesh_with_alternatives()
    parts = [((4, 1), [0]), ((1, 4), [1, 2])]
    layout = Layout(docs, mesh_with_alternatives(), parts=parts)
    arrived = from_bytes(to_bytes(layout), mesh)
    assert arrived.mesh is mesh
    assert [part.mesh for part in arrived.parts] == [mesh.alternatives[0], mesh.alternatives[2]]
    assert all(any(part.mesh is one for one in mesh.alternatives) for part in arrived.parts)


def test_little_is_sent() -> None:
    """What plans were chosen by, the prices of all candidates on a machine, stays behind."""
    layout = Layout(Documents([977] * 300), MeshShape(1, 8, 1, 3))
    plans = plan_ahead(layout, [Attention(Shape(32, 8, 128, 128), AttentionOptions())])
    assert len(plans) == 1
    assert len(to_bytes((layout, plans))) < 50_000
    assert len(pickle.dumps(layout.parts[0].mesh.planned_for())) > 1000  # so one machine is not in it


def planned_elsewhere(case: Case, free: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """An attention on a layout of this process, and one on a layout that arrived with its plans."""
    mesh = free_mesh(2) if free else mesh_of(2, 1)
    here = Layout(case.docs, mesh)
    expected = attend_on(here, case, "auto")
    layout = Layout(case.docs, mesh.shape)
    sent = to_bytes((layout, plan_ahead(layout, attentions_of(here))))
    arrived, plans = from_bytes(sent, mesh)
    install(arrived, plans)
    with mock.patch.object(planner, "_plans", side_effect=AssertionError("planned again")):
        return expected, attend_on(arrived, case, "auto")


@pytest.mark.parametrize("free", [False, True])
def test_attention_finds_its_plan(pool: Pools, free: bool) -> None:
    case = Case(Documents([70, 5, 41]), heads=(4, 2))
    for expected, found in pool(2).run(planned_elsewhere, case, free):
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_what_attention_refuses_planning_ahead_refuses() -> None:
    layout = Layout(Documents([30]), MeshShape(1, 1, 2))
    with pytest.raises(ValueError, match=r'scheme="ring" moves keys on the ring axis and needs ring > 1'):
        plan_ahead(layout, [Attention(SHAPE, AttentionOptions(scheme="ring"))])


def test_kinds_of_attention_are_those_that_were_computed() -> None:
    layout = Layout(Documents([9, 4]), MeshShape())
    assert attentions_of(layout) == ()
    q, k = torch.zeros(13, 4, 8), torch.zeros(13, 2, 8)
    for mask in (Mask(), Mask(window=(3, 0)), Mask()):
        parallel_attention(q, k, k, layout, mask=mask)
    assert attentions_of(layout) == tuple(
        Attention(Shape(4, 2, 8, 8, 4), AttentionOptions(mask)) for mask in (Mask(), Mask(window=(3, 0)))
    )
