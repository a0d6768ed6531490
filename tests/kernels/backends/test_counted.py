"""Heads that one call of FlashAttention 2's backward pass may have."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn.kernels.backends.counted import COUNTED, ROUNDED, head_parts


@given(st.integers(0, 2**25), st.integers(1, 16), st.integers(1, 12), st.sampled_from([8, 64, 96, 128, 192, 256]))
def test_parts_are_all_heads_once_and_can_be_counted(rows: int, key_heads: int, group: int, dim: int) -> None:
    rounded = -(-dim // ROUNDED) * ROUNDED
    if rows * rounded >= COUNTED:
        with pytest.raises(NotImplementedError, match=f"{rows:,} rows"):
            head_parts(rows, key_heads * group, key_heads, dim)
        return
    parts = head_parts(rows, key_heads * group, key_heads, dim)
    assert [head for queries, _ in parts for head in range(queries.start, queries.stop)] == [*range(key_heads * group)]
    for queries, keys in parts:
        size, count = queries.stop - queries.start, keys.stop - keys.start
        assert rows * rounded * size < COUNTED
        assert {head // group for head in range(queries.start, queries.stop)} == {*range(keys.start, keys.stop)}
        assert count == 1 or size == count * group  # only parts of one group may be parts


def test_what_is_counted_is_one_call() -> None:
    assert head_parts(524_287, 32, 8, 128) == [(slice(0, 32), slice(0, 8))]
    assert len(head_parts(524_288, 32, 8, 128)) == 2
