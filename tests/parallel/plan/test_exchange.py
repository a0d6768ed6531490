"""Heads that are dealt for an exchange, and the bytes of its messages."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn.parallel.plan.exchange import Exchange, exchange_plan
from ringattn.parallel.plan.messages import exchange_messages, rank_widths
from ringattn.parallel.plan.shape import Shape


@st.composite
def exchanges(draw: st.DrawFn) -> tuple[list[Exchange], int, int]:
    """The exchange as every rank plans it, and its query heads and key heads."""
    ranks, key_heads, group = draw(st.integers(1, 8)), draw(st.integers(1, 8)), draw(st.integers(1, 8))
    groups = draw(st.integers(1, 4))
    rows = tuple(pairwise([0, *sorted(draw(st.lists(st.integers(0, 50), min_size=ranks, max_size=ranks)))]))
    heads = key_heads * group, key_heads
    return [exchange_plan(rows, *heads, rank, groups) for rank in range(ranks)], *heads


@given(drawn=exchanges())
def test_every_query_head_is_computed_once_with_its_key_head(drawn: tuple[list[Exchange], int, int]) -> None:
    """By its local number, as a kernel finds it: local query head j reads local key head j // (queries / keys)."""
    plans, query_heads, key_heads = drawn
    assert len({(plan.heads, plan.groups) for plan in plans}) == 1
    assert [head for plan in plans for head in range(*plan.share.query)] == list(range(query_heads))
    counts = [plan.share.queries for plan in plans]
    assert max(counts) - min(counts) <= 1
    for plan in plans:
        share = plan.share
        for local in range(share.queries):
            assert share.keys[local * len(share.keys) // share.queries] == (share.query[0] + local) // (
                query_heads // key_heads
            )
        assert share.queries == 0 or share.queries % len(share.keys) == 0


@given(drawn=exchanges())
def test_groups_of_heads_hold_every_head_once_and_the_keys_that_they_read(
    drawn: tuple[list[Exchange], int, int],
) -> None:
    for plan in drawn[0]:
        share, groups = plan.share, plan.groups
        parts = [share.group(number, groups) for number in range(groups)]
        assert [head for queries, _ in parts for head in range(*queries)] == list(range(share.queries))
        assert len({queries[1] - queries[0] for queries, _ in parts}) == 1
        for queries, keys in parts:
            read = {local * len(share.keys) // share.queries for local in range(*queries)}
            assert set(range(*keys)) == read


@given(drawn=exchanges(), backward=st.booleans(), wide=st.booleans(), groups=st.integers(1, 4))
def test_groups_carry_the_bytes_of_one_message(
    drawn: tuple[list[Exchange], int, int], backward: bool, wide: bool, groups: int
) -> None:
    plans, query_heads, key_heads = drawn
    shape = Shape(query_heads, key_heads, 16, 8)
    ways = zip(*(exchange_messages(plans[0], shape, backward, wide, count) for count in (1, groups)), strict=True)
    for whole, parted in ways:
        for one, several in zip(*(map(sum, zip(*messages, strict=True)) for messages in (whole, parted)), strict=True):
            assert several == pytest.approx(one)
    there, _ = exchange_messages(plans[0], shape, False, wide)
    queries, keys = query_heads * shape.head_dim, sum(len(plan.share.keys) for plan in plans) * 24
    assert sum(rank_widths(plans[0], there[0])) == (queries + keys) * shape.itemsize
