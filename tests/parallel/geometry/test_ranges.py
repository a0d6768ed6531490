"""Ranges against the sets of their numbers."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from ringattn.kernels.spec import Range
from ringattn.parallel.geometry.ranges import gaps, length, overlap, touching, union

MOST = 40
RANGE = st.tuples(st.integers(0, MOST - 12), st.integers(0, 12)).map(lambda drawn: (drawn[0], drawn[0] + drawn[1]))
SPANS = st.lists(RANGE, max_size=8)


def numbers(spans: list[Range] | tuple[Range, ...]) -> list[int]:
    return [number for span in spans for number in range(*span)]


@given(spans=SPANS)
def test_a_union_holds_the_same_numbers_in_ranges_apart(spans: list[Range]) -> None:
    found = union(spans)
    assert numbers(found) == sorted(set(numbers(spans)))
    assert all(a[1] < b[0] for a, b in pairwise(found))
    assert all(start < stop for start, stop in found)


@given(spans=SPANS, rows=st.integers(MOST, MOST + 3))
def test_gaps_are_what_is_not_covered(spans: list[Range], rows: int) -> None:
    found = gaps(spans, rows)
    assert numbers(found) == sorted(set(range(rows)) - set(numbers(spans)))
    assert all(a[1] < b[0] for a, b in pairwise(found))


@given(spans=SPANS)
def test_ranges_that_touch_are_made_one_and_keep_their_order(spans: list[Range]) -> None:
    found = touching(spans)
    assert numbers(found) == numbers(spans)
    assert all(a[1] != b[0] for a, b in pairwise(found))


@given(a=RANGE, b=RANGE)
def test_an_overlap_is_what_is_in_both(a: Range, b: Range) -> None:
    assert set(range(*overlap(a, b))) == set(range(*a)) & set(range(*b))


@given(spans=SPANS)
def test_a_length_is_the_number_of_numbers(spans: list[Range]) -> None:
    assert length(spans) == len(numbers(spans))
