"""Routes: sizes and places of messages, in rows and in elements."""

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from ringattn.parallel.plan.route import Message, Route

SIZES = st.lists(st.integers(0, 60), min_size=1, max_size=6)


@given(receives=SIZES, data=st.data(), width=st.integers(1, 64))
def test_a_route_of_elements_is_that_of_rows_times_their_width(
    receives: list[int], data: st.DataObject, width: int
) -> None:
    same = st.lists(st.integers(0, 60), min_size=len(receives), max_size=len(receives))
    route = Route(tuple(data.draw(same)), tuple(receives), tuple(data.draw(same)), data.draw(st.integers(0, 400)))
    wide = route.times(width)
    assert wide.begins == tuple(width * begin for begin in route.begins)
    assert [begin + size for begin, size in zip(route.begins, receives, strict=True)] == list(accumulate(receives))
    assert (wide.sent, wide.received, wide.most) == tuple(width * x for x in (route.sent, route.received, route.most))
    assert wide.grain == width * route.grain
    assert all(number % max(route.grain, 1) == 0 for number in (*route.sends, *route.receives, *route.there))
    assert route.times(width) is wide


@given(sizes=SIZES)
def test_a_message_has_the_rows_of_its_ranges(sizes: list[int]) -> None:
    assert Message(0, tuple((2 * size, 3 * size) for size in sizes)).rows == sum(sizes)
