"""Degrees and chunks of heads that were left open: what is taken fits, is the fastest that does, and is the longest."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn.documents import Documents
from ringattn.mask import Mask
from ringattn.memory.planning.choice import Choice, longest, plan_run
from ringattn.memory.planning.limits import GIB, Limits
from ringattn.memory.planning.planner import TIE, Planner
from ringattn.memory.planning.shapes import RunShape
from ringattn.memory.planning.ways import FreeShape, Ways
from ringattn.parallel.layout import Layout
from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.parallel.mesh.shape import MeshShape
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.planner import plan_attention
from ringattn.settings import AttentionOptions
from tests.memory.planning.shapes_of import llama_8b

H200 = SHIPPED["H200"]
CHUNKS, ALL = FreeShape(chunks=True), FreeShape(degrees=True, chunks=True)
# So that few settings are tried, and attention is what memory runs out for.
FIXED: dict[str, Any] = {"keep": "layer", "mlp_tile": 4096, "loss_tile": 1024, "reshard": True, "prefetch": 0}
FIXED |= {"every": 1, "states_on": "host"}
LONG = RunShape(2**20, ring=2, fused=True)
TIGHT = Limits(60 * GIB)


def plan(run: RunShape, free: FreeShape, limits: Limits = TIGHT) -> Choice:
    return plan_run(llama_8b(2), run, FIXED, limits, free=free)


def candidates() -> list[RunShape]:
    """All shapes of two ranks, by hand."""
    counts = {(2, 1): (1, 2, 4, 8), (1, 2): (1, 2, 4)}
    return [replace(LONG, ring=r, ulysses=u, head_chunks=n) for (r, u), all_n in counts.items() for n in all_n]


def test_all_shapes_are_candidates() -> None:
    ways = Ways(Planner(llama_8b(2), LONG, TIGHT), ALL)
    assert set(ways.shapes) == set(candidates())
    assert len(ways.shapes) == len(candidates())
    assert ways.first.run.head_chunks == 1
    assert ways.first.mixing_seconds == min(p.mixing_seconds for p in ways.planners if p.run.head_chunks == 1)
    asked = replace(LONG, head_chunks=8)
    assert Ways(Planner(llama_8b(2), asked, TIGHT), FreeShape(degrees=True)).shapes == [asked]
    assert Ways(Planner(llama_8b(2), asked, TIGHT)).shapes == [asked]


@pytest.mark.parametrize("room", [50, 52, 55, 58, 64])
def test_the_fastest_of_all_candidates_is_taken(room: int) -> None:
    limits = Limits(room * GIB)
    every = [Planner(llama_8b(2), run, limits).fastest(FIXED) for run in candidates()]
    fitting = [one for one in every if one is not None]
    assert 0 < len(fitting) < len(every), "a limit that tells candidates apart"
    found = plan(LONG, ALL, limits)
    assert not found.settled.lacking
    fewest = [one for one in fitting if one.alive.run.head_chunks == 1]
    if Planner(llama_8b(2), Ways(Planner(llama_8b(2), LONG, limits), ALL).first.run, limits).fastest(FIXED):
        assert found.plan.run.head_chunks == 1
        assert found.time.seconds == min(one.time.seconds for one in fewest)
    else:
        assert found.time.seconds <= min(one.time.seconds for one in fitting) * (1 + TIE)
        assert found.plan.run in [one.alive.run for one in fitting]


def test_chunks_are_taken_only_where_one_does_not_fit() -> None:
    wide = Limits(140 * GIB)
    assert plan(LONG, CHUNKS, wide).settled == plan(LONG, FreeShape(), wide).settled
    assert plan(LONG, CHUNKS, wide).text() == plan(LONG, FreeShape(), wide).text()
    with pytest.raises(ValueError, match="do not fit 2 GPUs"):
        plan(LONG, FreeShape())
    found = plan(LONG, CHUNKS)
    assert found.plan.run.head_chunks > 1
    assert (found.plan.run.ring, found.plan.run.ulysses) == (2, 1)
    reasons = {one.value: one.reason for one in found.alternatives if one.key == "head_chunks"}
    assert set(reasons) == {1, 2, 4, 8} - {found.plan.run.head_chunks}
    assert "GiB of GPU memory" in reasons[1]
    assert f"head_chunks={found.plan.run.head_chunks}\n" in found.text()
    assert {key: found.settled.values[key] for key in FIXED} == FIXED


def test_asked_chunks_stay_and_are_refused_with_those_that_would_do() -> None:
    chosen = plan(LONG, CHUNKS).plan.run.head_chunks
    asked = plan(replace(LONG, head_chunks=8), FreeShape())
    assert asked.plan.run.head_chunks == 8
    assert "head_chunks=8*" in asked.text()
    with pytest.raises(ValueError, match=r"do not fit .* with parallel\.head_chunks=(\d)") as refused:
        plan(LONG, FreeShape())
    told = int(str(refused.value).partition("head_chunks=")[2][0])
    assert 1 < told <= chosen
    assert not plan(replace(LONG, head_chunks=told), FreeShape()).settled.lacking
    with pytest.raises(ValueError, match="do not fit") as refused:
        plan(LONG, ALL, Limits(12 * GIB))
    assert "head_chunks" not in str(refused.value)


@settings(max_examples=12, deadline=None)
@given(room=st.integers(20, 140), more=st.integers(0, 60), ranks=st.sampled_from([1, 2, 4]))
def test_the_longest_grows_with_what_is_open_and_with_memory(room: int, more: int, ranks: int) -> None:
    def found(free: FreeShape, gib: int, chunks: int = 1, ulysses: int = 1) -> int:
        run = RunShape(1, ring=ranks // ulysses, ulysses=ulysses, head_chunks=chunks, fused=True)
        return longest(llama_8b(2), run, FIXED, Limits(gib * GIB, 100 * GIB), free=free)

    every = found(ALL, room)
    assert every >= found(CHUNKS, room) >= max(found(FreeShape(), room, chunks) for chunks in (1, 2, 8))
    assert every >= found(CHUNKS, room, ulysses=ranks)
    assert found(ALL, room + more) >= every
    if every:
        limits = Limits(room * GIB, 100 * GIB)
        assert not plan(RunShape(every, ring=ranks, fused=True), ALL, limits).settled.lacking


def test_the_fastest_change_after_memory_ran_out_may_be_chunks() -> None:
    found = plan(LONG, FreeShape(), Limits(140 * GIB))
    better = plan(replace(LONG, head_chunks=4), FreeShape(), Limits(140 * GIB))
    key, value, other = found.smaller(better.plan.peak().total) or ("", 0, found.settled)
    assert (key, other.alive.run.head_chunks) == ("head_chunks", value)
    assert other.alive.peak().total <= better.plan.peak().total
    least = plan(replace(LONG, head_chunks=8), FreeShape(), Limits(140 * GIB))
    assert (least.smaller(0) or ("",))[0] != "head_chunks"


@settings(max_examples=30, deadline=None)
@given(keys=st.integers(1, 12), groups=st.integers(1, 3), ulysses=st.integers(1, 8))
def test_attention_takes_the_chunks_that_models_say(keys: int, groups: int, ulysses: int) -> None:
    model = replace(llama_8b(1), key_heads=keys, query_heads=keys * groups)
    layout = Layout(Documents([256]), MeshShape(1, 1, ulysses))
    counts = model.head_chunks(ulysses)
    assert counts[0] == 1
    assert len(counts) == 1 or keys % ulysses == 0
    for count in counts:
        shape = Shape(keys * groups, keys, 64, 64)
        if ulysses <= keys * groups:
            assert plan_attention(layout, shape, AttentionOptions(Mask(), head_chunks=count)).head_chunks == count


def test_layers_with_several_numbers_of_key_heads_part_alike() -> None:
    assert replace(llama_8b(1), key_heads=8, common_keys=4).head_chunks(1) == (1, 2, 4)
    assert replace(llama_8b(1), masks=()).head_chunks(1) == (1,)


@pytest.mark.parametrize(("ring", "ulysses"), [(2, 1), (1, 2), (4, 2), (1, 1)])
def test_more_chunks_are_no_faster_and_hold_less(ring: int, ulysses: int) -> None:
    model = llama_8b(2)
    runs = [RunShape(2**18, ring=ring, ulysses=ulysses, head_chunks=n) for n in model.head_chunks(ulysses)]
    planners = [Planner(model, run, TIGHT, H200) for run in runs]
    assert len(planners) > 1
    seconds = [one.mixing_seconds for one in planners]
    assert seconds == sorted(seconds)
    peaks = [one.settled(FIXED).alive.peak().total for one in planners]
    assert peaks == sorted(peaks, reverse=True)
