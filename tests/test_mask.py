"""Bands and masks: closed forms against the dense matrix."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringattn.mask import Band, Mask

WINDOWS = st.tuples(st.integers(-1, 14), st.integers(-1, 14))
MASKS = st.builds(Mask, causal=st.booleans(), window=WINDOWS)


@st.composite
def query_ranges(draw: st.DrawFn) -> tuple[int, int, int]:
    """A document's length and a range of its queries, empty ones included."""
    length = draw(st.integers(0, 14))
    start = draw(st.integers(0, length))
    return length, start, draw(st.integers(start, length))


@given(MASKS, query_ranges())
def test_area_is_the_number_of_allowed_pairs(mask: Mask, queries: tuple[int, int, int]) -> None:
    length, start, stop = queries
    assert mask.band.area(start, stop, length) == int(mask.dense(length)[start:stop].sum())


@given(MASKS, query_ranges())
def test_keys_of_is_the_union_over_the_queries(mask: Mask, queries: tuple[int, int, int]) -> None:
    length, start, stop = queries
    seen = mask.dense(length)[start:stop].any(dim=0).nonzero().flatten().tolist()
    first, last = mask.band.keys_of(start, stop, length)
    assert list(range(first, last)) == seen
    assert 0 <= first <= last <= length


@given(st.integers(0, 10**12), st.integers(0, 10**12), st.integers(0, 10**12), MASKS)
def test_area_adds_up_at_any_size(a: int, b: int, c: int, mask: Mask) -> None:
    """Cutting a range of queries changes nothing, with no rounding at lengths far beyond what can be drawn."""
    a, b, c = sorted((a, b, c))
    band = mask.band
    assert band.area(0, a, c) + band.area(a, b, c) + band.area(b, c, c) == band.area(0, c, c)
    if band == Band(None, 0):
        assert band.area(0, c, c) == c * (c + 1) // 2


@given(st.booleans(), WINDOWS, st.one_of(st.none(), st.integers(1, 8)), st.integers(0, 14))
def test_dense_is_the_rule_pair_by_pair(causal: bool, window: tuple[int, int], chunk: int | None, length: int) -> None:
    left, right = window
    dense = Mask(causal, window, chunk).dense(length)
    assert dense.shape == (length, length)
    for q in range(length):
        for k in range(length):
            allowed = not (causal and k > q)
            allowed = allowed and (left < 0 or k >= q - left) and (right < 0 or k <= q + right)
            allowed = allowed and (chunk is None or q // chunk == k // chunk)
            assert bool(dense[q, k]) == allowed


@given(MASKS, st.integers(1, 14))
def test_every_query_sees_itself(mask: Mask, length: int) -> None:
    """What the closed form of the area rests on."""
    assert bool(mask.dense(length).diagonal().all())
    assert mask.band.lo is None or mask.band.lo <= 0
    assert mask.band.hi is None or mask.band.hi >= 0


def test_bands_say_which_side_of_a_window_is_open() -> None:
    assert Mask().band == Band(None, 0)
    assert Mask(causal=False).band == Band(None, None)
    assert Mask(window=(7, -1)).band == Band(-7, 0)
    assert Mask(window=(7, 3)).band == Band(-7, 0)  # causal wins over a right side
    assert Mask(causal=False, window=(7, 3)).band == Band(-7, 3)
    assert Mask(causal=False, window=(0, -1)).band == Band(0, None)
    assert Mask(chunk=4).band == Mask().band


def test_masks_are_values() -> None:
    assert Mask(window=[2, 0]) == Mask(window=(2, 0))  # type: ignore[arg-type]
    assert hash(Mask(window=[2, 0])) == hash(Mask(window=(2, 0)))  # type: ignore[arg-type]
    assert str(Mask()) == "causal"
    assert str(Mask(causal=False, window=(2, -1), chunk=8)) == "bidirectional window 2,-1 chunk 8"
    assert Mask().dense(3).dtype == torch.bool


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 4}, "window must be a pair (left, right) of integers >= -1 (-1 is open), got 4"),
        ({"window": (4,)}, "got (4,)"),
        ({"window": (4, 0, 0)}, "got (4, 0, 0)"),
        ({"window": (-2, 0)}, "got (-2, 0)"),
        ({"window": (1.5, 0)}, "got (1.5, 0)"),
        ({"window": (True, 0)}, "got (True, 0)"),
        ({"window": None}, "got None"),
        ({"chunk": 0}, "chunk must be None or an integer >= 1, got 0"),
        ({"chunk": -3}, "chunk must be None or an integer >= 1, got -3"),
        ({"chunk": 2.0}, "chunk must be None or an integer >= 1, got 2.0"),
        ({"chunk": True}, "chunk must be None or an integer >= 1, got True"),
        ({"causal": 1}, "causal must be True or False, got 1"),
        ({"causal": None}, "causal must be True or False, got None"),
    ],
)
def test_refusals_name_the_argument_and_the_value(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Mask(**arguments)
    assert str(caught.value).startswith(f"{next(iter(arguments))} must be")


@pytest.mark.parametrize(
    ("system", "given", "causal", "window", "tokens"),
    [
        ("transformers", 4, True, (3, 0), 4),
        ("transformers", 4, False, (3, 3), 7),
        ("FlashAttention", (4, 0), True, (4, 0), 5),
        ("FlashAttention", (4, 2), False, (4, 2), 7),
        ("ejkernel", 4, True, (4, 0), 5),
        ("ejkernel", 4, False, (4, 4), 9),
        ("ejkernel", (4, 2), False, (4, 2), 7),
    ],
)
def test_windows_of_other_systems_are_those_of_the_table(
    system: str, given: Any, causal: bool, window: tuple[int, int], tokens: int
) -> None:
    """The table in `Mask`, and how many keys a query far from both ends sees. The systems' own rules are spelt out."""
    rules = {
        "transformers": lambda far: (far < given) & (far > (-1 if causal else -given)),
        "FlashAttention": lambda far: (far <= given[0]) & (-far <= given[1]),
        "ejkernel": lambda far: (
            (far <= given) & (-far <= (0 if causal else given))
            if isinstance(given, int)
            else (far <= given[0]) & (-far <= given[1])
        ),
    }
    place = torch.arange(30)
    allowed = rules[system](place[:, None] - place[None, :])
    assert allowed[15].sum() == tokens
    assert torch.equal(Mask(causal, window).dense(30), allowed)
    assert system in (Mask.__doc__ or "")


def test_negative_sides_are_refused_and_zero_is_a_window() -> None:
    with pytest.raises(ValueError, match="window must be a pair"):
        Mask(window=(-2, 0))
    assert Mask(window=(0, 0)).dense(5).sum() == 5  # where ejkernel's Triton kernel means none
