"""Layers that carry a state, played through: what ranks compute is what is priced, and transfers wait for the last."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn import Documents, Layout, MeshShape
from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.recurrent.plan import roles_of
from ringattn.recurrent.price import ROUTES, RecurrenceShape, kernel_seconds, map_share, prices, round_times
from ringattn.recurrent.timeline import FOLLOWED, OPENED, TOLD, WHOLE, play

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
    roles, ranks = roles_of(layout), ring * ulysses
    whole, firsts, middles, lasts = (
        sum(piece.size for one in roles for piece in getattr(one, name))
        for name in ("whole", "firsts", "middles", "lasts")
    )
    rows = {  # in passes over a row
        "forward": {WHOLE: whole, OPENED: firsts + (1 + map_share(shape)) * middles, FOLLOWED: middles + lasts},
        "backward": {WHOLE: 2 * whole, OPENED: 3 * firsts + 2 * middles, FOLLOWED: 3 * (middles + lasts)},
    }
    composing = round_times(layout, shape, prices(layout, shape, H200)[0].rounds, H200).composing * ranks
    for name, times in (("forward", 1), ("backward", 2)):
        played = play(layout, shape, route, H200)[name]
        stages = dict.fromkeys((WHOLE, OPENED, FOLLOWED), 0.0)
        for spans in played.by_rank:
            for one, other in pairwise(spans):  # a rank does one thing after another
                assert one.end <= other.begin + 1e-15
            for span in spans:
                if span.kind == "compute":
                    stages[span.stage] += span.end - span.begin
        if route == "scan":
            expected = {stage: kernel_seconds(shape, held, H200) for stage, held in rows[name].items()}
            expected[FOLLOWED if name == "forward" else OPENED] += composing
            assert stages == pytest.approx(expected)
        else:
            assert stages[WHOLE] == pytest.approx(times * kernel_seconds(shape, sum(lengths), H200))
        assert (route, name) in TOLD
        if ranks == 1:
            assert {span.kind for span in played.spans} <= {"compute"}


def test_whole_documents_are_computed_while_states_are_under_way() -> None:
    layout = Layout(Documents([9000, 100, 4000]), MeshShape(ring=4))
    forward = play(layout, DELTA, "scan", H200)["forward"]
    posted = max((span.end for span in forward.spans if span.stage == OPENED and span.kind == "compute"), default=0.0)
    times = round_times(layout, DELTA, prices(layout, DELTA, H200)[0].rounds, H200).transfers
    for spans in forward.by_rank:
        waits = [span for span in spans if span.kind == "states"]
        for span in waits[:1]:  # the first ends for all together, and begins where a rank has nothing left to do
            assert span.end == pytest.approx(posted + times[0])
            assert span.begin == max((one.end for one in spans if one.end <= span.begin), default=0.0)
        own = [span for span in spans if span.stage == WHOLE and span.kind == "compute"]
        assert all(span.begin <= posted for span in own)
        assert (
            min(span.begin for span in spans if span.stage == FOLLOWED and span.kind == "compute") >= posted + times[0]
        )


@pytest.mark.parametrize("shape", [DELTA, MAMBA2])
@pytest.mark.parametrize("number", range(2))
def test_of_equal_pieces_it_takes_what_is_priced(shape: RecurrenceShape, number: int) -> None:
    layout = Layout(Documents([8192]), MeshShape(ring=2), "contiguous")
    priced = prices(layout, shape, H200)[number]
    seconds = sum(one.seconds for one in play(layout, shape, priced.route, H200).values())
    assert seconds == pytest.approx(3 * kernel_seconds(shape, 4096, H200) + priced.seconds, rel=1e-6)
