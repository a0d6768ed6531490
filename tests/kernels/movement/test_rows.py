"""Rows in and out of messages: plain torch and the Triton kernels against indexing, row by row."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ringattn.kernels.movement.additions import Addition, Additions
from ringattn.kernels.movement.rows import add_rows, row_index, take_rows
from tests.kernels.interpreter import interpreted, run_interpreted, starts_the_interpreter


class Taken(NamedTuple):
    index: Tensor
    message: Tensor | None
    pair: tuple[Tensor, Tensor]
    target: Tensor
    expected: Tensor


def columns(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of a wider tensor."""
    wide = torch.randn(rows, width + 8, generator=torch.Generator().manual_seed(seed))
    return wide.to(dtype)[:, 4 : 4 + width]


@st.composite
def takes(draw: st.DrawFn) -> Taken:
    arrived, own, seed = draw(st.integers(0, 40)), draw(st.integers(1, 40)), draw(st.integers(0, 9))
    a, b = draw(st.sampled_from([(1, 3), (24, 24), (512, 256), (64, 32), (24, 8), (32, 64)]))
    pair = columns(own, a, seed), columns(own, b, seed + 1)
    message = columns(arrived, a + b, seed + 2) if arrived else None
    rows = draw(st.lists(st.integers(0, arrived + own - 1), max_size=50))
    both = torch.cat([*([] if message is None else [message]), torch.cat(pair, 1)])
    narrow = draw(st.booleans())
    expected = both[torch.tensor(rows, dtype=torch.int64)].to(torch.float16 if narrow else torch.float32)
    target = torch.full((len(rows), a + b + 2), 7.0, dtype=expected.dtype)
    return Taken(torch.tensor(rows, dtype=torch.int32), message, pair, target, expected)


class Added(NamedTuple):
    additions: Additions
    message: Tensor
    pair: tuple[Tensor, Tensor]
    sums: tuple[Tensor, Tensor]
    fresh: bool
    expected: tuple[Tensor, Tensor]


@st.composite
def adds(draw: st.DrawFn) -> Added:
    rows, seed = draw(st.integers(1, 70)), draw(st.integers(0, 9))
    a, b = draw(st.sampled_from([(1, 3), (24, 24), (512, 256), (64, 32), (24, 8), (32, 64)]))
    narrow = draw(st.booleans())
    dtype = torch.float16 if narrow else torch.float32
    message, pair = columns(50, a + b, seed, dtype), (columns(50, a, seed + 1, dtype), columns(50, b, seed + 2, dtype))
    sums = columns(rows, a, seed + 3), columns(rows, b, seed + 4)
    fresh = draw(st.booleans())
    expected = sums[0].clone(), sums[1].clone()
    parts, reached = [], torch.zeros(rows, dtype=torch.bool)
    for _ in range(draw(st.integers(0, 5))):
        start = draw(st.integers(0, rows - 1))
        size = draw(st.integers(1, min(rows - start, 50)))
        source, remote = draw(st.integers(0, 50 - size)), draw(st.booleans())
        parts.append(Addition((start, start + size), source, remote))
        taken = (message[:, :a], message[:, a:]) if remote else pair
        for total, part in zip(expected, taken, strict=True):
            if fresh:
                total[start : start + size][~reached[start : start + size]] = 0.0
            total[start : start + size] += part[source : source + size].float()
        reached[start : start + size] = True
    if fresh:  # rounded once
        sums, expected = tuple(x.to(dtype) for x in sums), tuple(x.to(dtype) for x in expected)
    return Added(Additions(tuple(parts)), message, pair, sums, fresh, expected)


@given(case=takes())
def test_rows_are_taken(case: Taken) -> None:
    target = case.target[:, : case.expected.shape[1]]
    take_rows(case.index, target, case.message, case.pair)
    assert torch.equal(target, case.expected)
    assert (case.target[:, case.expected.shape[1] :] == 7).all()


@given(case=adds())
def test_rows_are_added_in_order(case: Added) -> None:
    add_rows(case.additions, case.message, case.pair, case.sums, case.fresh)
    for total, expected in zip(case.sums, case.expected, strict=True):
        assert torch.equal(total, expected)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9))))
def test_the_index_of_ranges_is_their_numbers(starts: list[tuple[int, int]]) -> None:
    ranges = [(start, start + size) for start, size in starts]
    assert row_index(ranges).tolist() == [row for span in ranges for row in range(*span)]


def on_device(case: Taken | Added) -> list:
    return [
        tuple(x.cuda() for x in part) if isinstance(part, tuple) and part and isinstance(part[0], Tensor) else part
        for part in (part.cuda() if isinstance(part, Tensor) else part for part in case)
    ]


@pytest.mark.gpu
@given(taken=takes(), added=adds())
def test_rows_are_moved_by_triton_on_a_device(taken: Taken, added: Added) -> None:
    index, message, pair, target, expected = on_device(taken)
    target = target[:, : expected.shape[1]]
    take_rows(index, target, message, pair)
    assert torch.equal(target, expected)
    additions, message, pair, sums, fresh, expected = on_device(added)
    add_rows(additions, message, pair, sums, fresh)
    for total, right in zip(sums, expected, strict=True):
        assert torch.equal(total, right)


@interpreted
@settings(max_examples=25)
@given(taken=takes(), added=adds())
def test_triton_interpreted(taken: Taken, added: Added) -> None:
    from ringattn.kernels.movement import rows_triton

    target = taken.target[:, : taken.expected.shape[1]]
    if target.numel():
        rows_triton.take_rows(taken.index, target, taken.message, taken.pair)
    assert torch.equal(target, taken.expected)
    assert (taken.target[:, taken.expected.shape[1] :] == 7).all()
    if added.additions.parts:
        tables = added.additions.tables(added.message.device)
        rows_triton.add_rows(*tables, added.message, added.pair, added.sums, added.fresh)
    for total, expected in zip(added.sums, added.expected, strict=True):
        assert torch.equal(total, expected)


@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_interpreted(__file__, 1)
