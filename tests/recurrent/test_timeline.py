"""Layers that carry a state, played through: what ranks compute is what is priced, and transfers wait for the last."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn import Documents, Layout, MeshShape
from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.recurrent.price import ROUTES, RecurrenceShape, kernel_seconds, map_share, prices
from ringattn.recurrent.timeline import CUT, MAPS, TOLD, WHOLE, play

H200 = SHIPPED["H200"]
DELTA = RecurrenceShape(16, 32, 128, 64, True, False)
MAMBA2 = RecurrenceShape(8, 30, 128, 64, False, False)


@given(
    lengths=st.lists(st.integers(0, 9000), min_size=1, max_size=12).filter(sum),
    ring=st.sampled_from([1, 2, 3, 8]),
    ulysses=st.sampled_from([1, 2]),
    shape=st.sampled_from([DELTA, MAMBA2]),
    route=st.sampled_from(ROUTES),
)
def test_every_row_is_computed_once_a_pass(
    lengths: list[int], ring: int, ulysses: int, shape: RecurrenceShape, route: str
) -> None:
    layout = Layout(Documents(lengths), MeshShape(ring=ring, ulysses=ulysses))
    whole = kernel_seconds(shape, sum(lengths), H200)
    for name, times in (("forward", 1), ("backward", 2)):
        played = play(layout, shape, route, H200)[name]
        stages = dict.fromkeys((WHOLE, MAPS, CUT), 0.0)
        for spans in played.by_rank:
            for one, other in pairwise(spans):  # a rank does one thing after another
                assert one.end <= other.begin + 1e-15
            for span in spans:
                if span.kind == "compute":
                    stages[span.stage] += span.end - span.begin
        assert stages[WHOLE] + stages[CUT] == pytest.approx(times * whole)
        again = 1.0 if name == "backward" else 1.0 + map_share(shape)
        assert stages[MAPS] == pytest.approx(again / times * stages[CUT])
        assert (route, name) in TOLD
        if ring * ulysses == 1:
            assert {span.kind for span in played.spans} <= {"compute"}


def test_transfers_end_together_and_begin_when_a_rank_has_posted() -> None:
    layout = Layout(Documents([9000, 100, 4000]), MeshShape(ring=4))
    forward = play(layout, DELTA, "scan", H200)["forward"]
    gathers = [span for span in forward.spans if span.kind == "states"]
    assert len(gathers) == 4
    assert len({span.end for span in gathers}) == 1
    last = max(span.end for span in forward.spans if span.kind == "compute" and span.stage == MAPS)
    for span in gathers:
        assert span.begin == max(one.end for one in forward.by_rank[span.rank] if one.end <= span.begin)
    assert max(span.begin for span in gathers) == last
    assert min(span.begin for span in forward.spans if span.stage == CUT) == gathers[0].end


@pytest.mark.parametrize("shape", [DELTA, MAMBA2])
@pytest.mark.parametrize("number", range(2))
def test_of_equal_pieces_it_takes_what_is_priced(shape: RecurrenceShape, number: int) -> None:
    layout = Layout(Documents([8192]), MeshShape(ring=2), "contiguous")
    priced = prices(layout, shape, H200)[number]
    seconds = sum(one.seconds for one in play(layout, shape, priced.route, H200).values())
    assert seconds == pytest.approx(3 * kernel_seconds(shape, 4096, H200) + priced.seconds, rel=1e-6)
