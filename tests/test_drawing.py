"""Pictures: every pixel against the brute-force mask, and files that can be opened."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn import Documents, Layout, Mask, MeshShape
from ringattn.drawing import area, check_drawing, draw_plan, lightened, mask_image, picture, rank_colours, shown_ranks
from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.all_ranks import plan_group
from ringattn.parallel.planning.planner import plan_attention
from ringattn.parallel.simulation.simulate import simulate
from ringattn.parallel.simulation.spans import Pass, Span
from ringattn.settings import AttentionOptions
from tests.strategies import documents, masks

MASKS = [Mask(), Mask(causal=False), Mask(window=(7, 0)), Mask(causal=False, window=(3, 5)), Mask(chunk=9)]


def planned(lengths, ring, ulysses=1, mask=Mask(), scheme="auto"):
    layout = Layout(Documents(lengths), MeshShape(1, ring, ulysses), mask=mask)
    options = AttentionOptions(mask, scheme=scheme if ring > 1 else "auto")
    return layout, plan_group(layout.parts[0], Shape(4, 2, 64, 64), options, SHIPPED["H200"])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any),
    st.integers(1, 4),
    st.sampled_from(MASKS),
    st.sampled_from(["gather", "joint", "ring"]),
    st.sampled_from([7, 600]),
)
def test_every_pixel_is_the_pair_that_its_rank_computes(lengths, ring, mask, scheme, pixels):
    layout, plans = planned(lengths, ring, mask=mask, scheme=scheme)
    tokens = layout.docs.total
    owner, when = mask_image(plans, (0, tokens), pixels)
    side = min(tokens, pixels)
    samples = [(2 * i + 1) * tokens // (2 * side) for i in range(side)]
    docs = layout.docs.chunked(mask.chunk)
    allowed = docs.dense(Mask(mask.causal, mask.window)).numpy()[np.ix_(samples, samples)]
    holder = np.empty(tokens, int)
    for position in range(ring):
        holder[layout.indices(position).numpy()] = position
    assert np.array_equal(owner, np.where(allowed, holder[samples][:, None], -1))
    assert np.array_equal(owner >= 0, when >= 0)
    local = holder[samples][:, None] == holder[samples][None]
    assert not (allowed & ~local & (when == 0)).any()  # what is not held here needs a transfer


def test_a_part_of_the_stream():
    _, plans = planned([30, 50, 20], 2)
    whole, part = mask_image(plans, (0, 100))[0], mask_image(plans, (20, 60))[0]
    assert np.array_equal(part, whole[20:60, 20:60])


@pytest.mark.parametrize(
    ("lengths", "ring", "ulysses", "suffix"), [([3000, 70], 2, 2, "png"), ([5] * 400, 12, 1, "svg")]
)
def test_pictures_are_written(lengths, ring, ulysses, suffix, tmp_path):
    pytest.importorskip("matplotlib")
    layout, plans = planned(lengths, ring, ulysses)
    passes = {
        name: simulate(SHIPPED["H200"], plans, Shape(4, 2, 64, 64), name == "backward")
        for name in ("forward", "backward")
    }
    path = tmp_path / f"plan.{suffix}"
    draw_plan(plans, layout.docs.total, passes, {"forward": "gather", "backward": "gather"}, "a title", str(path))
    found = path.read_bytes()
    assert found.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    if suffix == "svg":
        assert b"ring position" not in found  # text is drawn as shapes
        assert found.count(b"<path") > 50


def test_of_many_ranks_the_extremes_are_shown():
    ends = [5.0] * 64
    ends[17], ends[30] = 9.0, 1.0
    done = Pass(64, tuple(Span(rank, "compute", 0, 0.0, end) for rank, end in enumerate(ends)))
    shown = shown_ranks(done)
    assert len(shown) <= 16
    assert {0, 17, 30, 63} <= set(shown)
    assert shown_ranks(Pass(3, ())) == [0, 1, 2]


def test_colours_differ():
    pytest.importorskip("matplotlib")
    for count in (2, 10, 11, 128):
        assert len(set(rank_colours(count))) == count
    assert len({lightened((0.2, 0.4, 0.6), stage, 5) for stage in range(5)}) == 5


def test_refusals_name_the_file_and_the_extra(monkeypatch):
    with pytest.raises(ValueError, match=r"'plan\.gif'"):
        check_drawing("plan.gif")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'ringattn\[draw\]'"):
        check_drawing("plan.png")


@given(
    docs=documents(longest=20, most=4),
    mask=masks,
    ring=st.integers(1, 4),
    policy=st.sampled_from(["contiguous", "zigzag", "balanced"]),
    scheme=st.sampled_from(["gather", "joint", "ring"]),
)
def test_the_picture_of_a_plan_is_its_mask(docs: Documents, mask: Mask, ring: int, policy: str, scheme: str) -> None:
    """Every pair once; and the areas of the ranks add up to the mask's."""
    layouts = [Layout(docs, MeshShape(1, ring, 1, rank), policy, mask) for rank in range(ring)]
    options = AttentionOptions(mask, scheme=scheme if ring > 1 else "auto")
    plans = [plan_attention(layout, Shape(4, 2, 128, 128), options) for layout in layouts]
    dense = docs.dense(mask)
    lines = picture(plans, docs.total).splitlines() if docs.total else []
    assert [[sign != "." for sign in line] for line in lines] == dense.tolist()
    assert sum(area(plan) for plan in plans) == int(dense.sum())


def test_the_picture_shows_the_stages() -> None:
    """Two ranks, one document, contiguous: the second receives the keys of the first."""
    layouts = [Layout(Documents([6]), MeshShape(1, 2, 1, rank), "contiguous") for rank in range(2)]
    plans = [plan_attention(layout, Shape(4, 2, 128, 128), AttentionOptions(scheme="ring")) for layout in layouts]
    assert picture(plans, 6).split() == ["0.....", "00....", "000...", "1110..", "11100.", "111000"]
    assert [area(plan) for plan in plans] == [6, 15]
