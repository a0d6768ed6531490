"""The event engine: order, exclusive resources, and times that can be counted by hand."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn.parallel.simulation.event_queue import Work


@st.composite
def works(draw) -> tuple[Work, list[list[int]]]:
    work, waits = Work(), []
    for number in range(draw(st.integers(1, 25))):
        after = draw(st.lists(st.integers(0, number - 1), max_size=3, unique=True)) if number else []
        held = tuple(draw(st.lists(st.integers(0, 3), max_size=3, unique=True)))
        work.add(draw(st.integers(0, 9)), after, held)
        waits.append(after)
    return work, waits


@settings(max_examples=100, deadline=None)
@given(works())
def test_tasks_wait_and_no_resource_is_held_twice(drawn):
    work, waits = drawn
    begin, end = work.run()
    for number, after in enumerate(waits):
        assert end[number] - begin[number] == work.seconds[number]
        assert all(end[before] <= begin[number] for before in after)
    for resource in range(4):
        held = sorted(
            (begin[task], end[task])
            for task in range(len(begin))
            if resource in work.resources[task] and end[task] > begin[task]
        )
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(held))
        assert max(end) >= sum(stop - start for start, stop in held)
    assert max(end) <= sum(work.seconds)  # something is always under way
    assert work.run() == (begin, end)


@settings(max_examples=50, deadline=None)
@given(works())
def test_without_resources_the_longest_path_decides(drawn):
    work, waits = drawn
    work.resources = [()] * len(work.seconds)
    _, end = work.run()
    longest: list[float] = []
    for number, after in enumerate(waits):
        longest.append(max((longest[before] for before in after), default=0) + work.seconds[number])
    assert end == longest


def test_who_waited_first_is_served_first():
    work = Work()
    work.add(3, (), (0,))
    late = work.add(1, (work.add(2),), (0,))
    early = work.add(1, (work.add(1),), (0, 1))
    begin, _ = work.run()
    assert (begin[early], begin[late]) == (3, 4)


def test_a_circle_is_an_error():
    work = Work()
    first = work.add(1)
    second = work.add(1, (first,))
    work.link(second, first)
    work.add(1)
    with pytest.raises(ValueError, match="2 tasks wait for one another"):
        work.run()
