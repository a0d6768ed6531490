"""Degrees chosen for a batch: the least predicted time, the same on every rank, and exact whatever they are."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn import Documents, Layout, Mask, MeshShape, init_mesh, parallel_attention
from ringattn.parallel.choice.degrees import MIXTURE_GAIN, RING_AXIS_GAIN, choose_degrees
from ringattn.parallel.machine.machine import Link, Machine
from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.planner import plan_parts
from tests.dense import Case, dense_attention, relative_error
from tests.pool import Pools

SHAPE = Shape(32, 8, 128, 128, 2)


def parted(size: int, rank: int = 0) -> MeshShape:
    """A mesh that leaves its degrees to layouts."""
    every = tuple(MeshShape(1, *degrees, rank) for degrees in MeshShape(1, size).parted())
    return replace(every[0], alternatives=every)


def machine(slow: str) -> Machine:
    """On which one primitive is hopeless."""
    links = {key: Link(1.0, 1e6) if key[1] == slow else link for key, link in SHIPPED["CPU"].links.items()}
    return replace(SHIPPED["CPU"], name=f"slow {slow}", links=links)


@given(lengths=st.lists(st.integers(0, 30_000), min_size=1, max_size=12).filter(any))
@settings(max_examples=25)
def test_the_fastest_degrees_are_chosen_on_every_rank(lengths: list[int]) -> None:
    docs, masks = Documents(lengths), ((Mask(), 1.0),)
    layouts = [Layout(docs, parted(8, rank)) for rank in range(8)]
    assert len({layout.reason for layout in layouts}) == len({layout.positions for layout in layouts}) == 1
    alone = [
        choose_degrees([mesh], lambda mesh: Layout(docs, mesh).parts[0], masks, SHAPE, SHIPPED["H200"])
        for mesh in parted(8).alternatives
    ]
    if len(layouts[0].parts) > 1:
        mixed = choose_degrees(
            parted(8).alternatives,
            lambda mesh: Layout(docs, mesh).parts[0],
            masks,
            SHAPE,
            SHIPPED["H200"],
            lambda parts: Layout(docs, parted(8), parts=parts).parts,
        )
        assert mixed.seconds <= min(one.seconds for one in alone) * (1 - MIXTURE_GAIN)
        return
    (best,) = [one for one in alone if one.parts[0].mesh.ulysses == layouts[0].mesh.ulysses]
    assert best.seconds <= min(one.seconds for one in alone) / (1 - RING_AXIS_GAIN)


def test_degrees_are_priced_by_what_their_own_mesh_has() -> None:
    """Ranks of several nodes: only the meshes with groups inside a node move data by copy engines there."""
    slow = machine("all_to_all")
    on = {1: slow, 2: slow, 4: slow, 8: SHIPPED["CPU"]}
    every = tuple(replace(mesh, machine=on[mesh.ulysses]) for mesh in parted(8).alternatives)
    docs = Documents([60_000])
    assert Layout(docs, replace(every[0], alternatives=every)).mesh.ulysses == 8
    assert Layout(docs, replace(every[0], alternatives=every), machine=slow).mesh.ulysses == 1  # asked for: for all
    parts = Layout(Documents([6000, 50]), replace(every[0], alternatives=every), parts=[((1, 8), [0]), ((8, 1), [1])])
    reasons = [plan.reason for _, plan in plan_parts(parts, Shape(32, 8, 128, 128)).parts]
    assert [slow.name in reason for reason in reasons] == [False, True]


@pytest.mark.parametrize(("slow", "ulysses"), [("all_to_all", 1), ("p2p", 8)])
def test_a_slow_link_is_avoided(slow: str, ulysses: int) -> None:
    layout = Layout(Documents([60_000]), parted(8), machine=machine(slow))
    assert layout.mesh.ulysses == ulysses
    assert f"ring {8 // ulysses} × ulysses {ulysses} of" in layout.reason


def test_no_more_ulysses_ranks_than_query_heads() -> None:
    layout = Layout(Documents([60_000]), parted(8), machine=machine("p2p"), heads=(2, 1))
    assert layout.mesh.ulysses <= 2


def test_one_node_holds_an_ulysses_group() -> None:
    assert MeshShape(1, 32).parted(8) == [(32, 1), (16, 2), (8, 4), (4, 8)]
    assert MeshShape(1, 6).parted(8) == [(6, 1), (3, 2), (2, 3), (1, 6)]


def attend(case: Case, slow: str) -> tuple[int, dict[str, torch.Tensor]]:
    mesh = init_mesh(data=1, sequence=4, device_type="cpu")
    layout = Layout(case.docs, mesh, machine=machine(slow), heads=case.heads)
    x = case.tensors()
    local = [layout.shard(x[name]).clone().requires_grad_() for name in ("q", "k", "v")]
    out = parallel_attention(*local, layout, backend="reference")
    out.backward(layout.shard(x["dout"]))
    grads = {f"d{name}": layout.unshard(y.grad) for name, y in zip("qkv", local, strict=True)}
    return layout.mesh.ulysses, {"out": layout.unshard(out.detach()), **grads}


@pytest.mark.parametrize(("slow", "ulysses"), [("all_to_all", 1), ("p2p", 4)])
def test_attention_is_exact_on_the_chosen_degrees(pool: Pools, slow: str, ulysses: int) -> None:
    case = Case(Documents([300, 7, 0, 150]), Mask(), (4, 2), (8, 8), torch.float64)
    expected = dense_attention(case)
    for taken, got in pool(4, "cpu").run_many(attend, [(case, slow)], timeout=120)[0]:
        assert taken == ulysses
        assert all(relative_error(got[name], expected[name]) < 1e-12 for name in got)


def test_degrees_are_given_or_left() -> None:
    with pytest.raises(ValueError, match="sequence=4 leaves ring and ulysses"):
        init_mesh(sequence=4, ring=2)
    with pytest.raises(ValueError, match="speeds"):
        Layout(Documents([100]), parted(2), "balanced", speeds=[1.0, 2.0])
