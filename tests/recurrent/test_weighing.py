"""Layouts that weigh a model's layers: integers that are right whatever is chosen, and choices that can be checked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn import Documents, Layout, Mask, MeshShape
from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.recurrent.price import RecurrenceShape, kernel_seconds
from ringattn.recurrent.weighing import GAIN, MixingLayers, seconds_of, weigh, weighed_layout

H200 = SHIPPED["H200"]
DELTA = RecurrenceShape(16, 32, 128, 128, True, False)
MAMBA2 = RecurrenceShape(8, 128, 128, 64, False, False)
LAYERS = {
    "few attention": MixingLayers(((Mask(), 2),), ((MAMBA2, 24),)),
    "windows too": MixingLayers(((Mask(), 2), (Mask(window=(511, 0)), 6)), ((DELTA, 24),)),
    "states alone": MixingLayers(states=((DELTA, 24),)),
    "attention alone": MixingLayers(((Mask(), 8),)),
}


@given(
    lengths=st.lists(st.integers(0, 6000), min_size=1, max_size=20).filter(sum),
    ring=st.sampled_from([1, 2, 3, 8]),
    ulysses=st.sampled_from([1, 2]),
    layers=st.sampled_from(sorted(LAYERS)),
)
def test_every_token_is_held_once_and_nothing_faster_was_left(
    lengths: list[int], ring: int, ulysses: int, layers: str
) -> None:
    docs, mesh, weighed = Documents(lengths), MeshShape(ring=ring, ulysses=ulysses, machine=H200), LAYERS[layers]
    found = weigh(docs, mesh, weighed)
    held = sorted(index for rank in range(ring * ulysses) for index in found.layout.indices(rank))
    assert held == list(range(docs.total))
    assert found.layout.is_on(mesh)
    assert found.seconds == seconds_of(found.layout, weighed)
    masks = weighed.masks or None
    for policy in ("auto", "contiguous"):
        other = Layout(docs, mesh, policy, masks, head_dim=weighed.head_dim)
        assert found.seconds <= seconds_of(other, weighed) * (1 + GAIN)


@given(lengths=st.lists(st.integers(1, 6000), min_size=1, max_size=20), times=st.sampled_from([2, 8, 32]))
def test_ranks_and_depth_do_not_change_the_choice(lengths: list[int], times: int) -> None:
    """By powers of two, which round nothing: costs that are equal but for a rounding may be cut elsewhere."""
    docs, layers = Documents(lengths), LAYERS["few attention"]
    deeper = MixingLayers(
        tuple((mask, times * count) for mask, count in layers.masks),
        tuple((rule, times * count) for rule, count in layers.states),
    )
    mesh = MeshShape(ring=4, machine=H200)
    one, other = weigh(docs, mesh, layers), weigh(docs, mesh, deeper)
    assert one.layout.positions == other.layout.positions
    assert other.seconds == pytest.approx(times * one.seconds)


def test_attention_is_balanced_and_states_are_cut_seldom() -> None:
    docs, mesh = Documents([5000] * 50), MeshShape(ring=8, machine=H200)
    found = {name: weigh(docs, mesh, layers) for name, layers in LAYERS.items()}
    assert found["attention alone"].layout.resolved_policy == "balanced"
    assert found["states alone"].layout.resolved_policy == "contiguous"
    assert found["states alone"].reason.startswith("contiguous on ring 8 × ulysses 1 of contiguous")
    assert "0 attention and 24 recurrent layers" in found["states alone"].reason


def test_a_recurrence_costs_per_token() -> None:
    layers = LAYERS["states alone"]
    whole = Layout(Documents([4096, 4096]), MeshShape(ring=2, machine=H200), "contiguous")
    assert seconds_of(whole, layers) == pytest.approx(24 * 3 * kernel_seconds(DELTA, 4096, H200))


def test_alternatives_of_a_mesh_are_weighed_too() -> None:
    free = MeshShape(ring=4, machine=H200, alternatives=(MeshShape(ring=4, machine=H200), MeshShape(ring=1, ulysses=4)))
    found = weigh(Documents([50_000] * 3), free, LAYERS["few attention"], H200)
    assert "on ring 1 × ulysses 4" in found.reason
    assert found.layout.is_on(free)


def test_heads_for_every_rank_where_the_degrees_are_open() -> None:
    few = MixingLayers(((Mask(), 1),), ((DELTA, 3),), heads=(4, 2), head_dim=16)
    meshes = tuple(MeshShape(ring=16 // ulysses, ulysses=ulysses, machine=H200) for ulysses in (4, 8))
    assert weigh(Documents([4096]), meshes[1], few).layout.mesh == meshes[1]
    free = MeshShape(ring=16, machine=H200, alternatives=meshes)
    assert weigh(Documents([4096]), free, few).layout.mesh == meshes[0]


@given(
    lengths=st.lists(st.integers(0, 6000), min_size=1, max_size=20).filter(sum),
    ring=st.sampled_from([1, 2, 8]),
    policy=st.sampled_from(["auto", "contiguous", "zigzag", "balanced"]),
    layers=st.sampled_from([None, *sorted(LAYERS)]),
)
def test_layers_count_where_they_are_given_and_no_policy_is_asked_for(
    lengths: list[int], ring: int, policy: str, layers: str | None
) -> None:
    docs, mesh = Documents(lengths), MeshShape(ring=ring, machine=H200)
    given_layers = None if layers is None else LAYERS[layers]
    found = weighed_layout(docs, mesh, policy, given_layers)
    if policy == "auto" and given_layers is not None:
        expected = weigh(docs, mesh, given_layers).layout
        assert found.reason == (expected.reason if ring > 1 else "")
    else:
        expected = Layout(docs, mesh, policy)
    assert found.positions == expected.positions


def test_trees_and_models_without_layers_are_refused() -> None:
    docs = Documents.from_tree([64, 32, 32], [-1, 0, 0])
    with pytest.raises(NotImplementedError, match="layout holds trees"):
        weigh(docs, MeshShape(ring=2, machine=H200), LAYERS["few attention"])
    for masks in ((), ((Mask(), 0),)):
        with pytest.raises(ValueError, match="masks and states must have a positive number of layers each, got"):
            MixingLayers(masks)
