"""The search of the longest stream, on memory that is a function."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.training.longest import STEP, Attempt, Longest, find_longest


class Memory:
    """Peaks of `fixed` GiB and `each` GiB for 1,024 tokens; the last `lost` GiB of `room` cannot be had."""

    def __init__(self, fixed: float, each: float, room: float, lost: float = 0.0) -> None:
        self.fixed, self.each, self.room, self.lost, self.tried = fixed, each, room, lost, []

    def attempt(self, tokens: int) -> Attempt:
        assert tokens % STEP == 0
        assert not any(tokens >= one for one in self.tried if self.peak(one) > self.room - self.lost), "does not fit"
        self.tried.append(tokens)
        peak = self.peak(tokens)
        fits = peak <= self.room - self.lost
        return Attempt(tokens, peak if fits else None, self.room, 1e-9 * tokens, "" if fits else "out of memory")

    def peak(self, tokens: int) -> float:
        return self.fixed + self.each * tokens / 1024

    @property
    def longest(self) -> int:
        return int((self.room - self.lost - self.fixed) / self.each) * 1024


@settings(max_examples=200, deadline=None)
@given(
    fixed=st.floats(0.1, 130), each=st.floats(0.01, 2), lost=st.floats(0, 5), first=st.integers(1, 2**20),
)  # fmt: skip
def test_it_finds_the_longest(fixed: float, each: float, lost: float, first: int) -> None:
    memory = Memory(fixed, each, 139.0, lost)
    found = find_longest(memory.attempt, first, precision=0.03)
    assert found.proved
    assert found.best <= max(memory.longest, 0)
    assert memory.longest - found.best < max(2 * STEP, 0.03 * memory.longest + STEP)


def test_few_attempts_are_enough() -> None:
    memory = Memory(24.0, 0.25, 139.0, lost=2.0)
    found = find_longest(memory.attempt, 65536, precision=0.03)
    assert memory.longest - found.best < 0.03 * memory.longest
    assert len(found.attempts) <= 4


def test_a_first_length_that_is_too_long_is_halved() -> None:
    memory = Memory(24.0, 1.0, 40.0)
    assert find_longest(memory.attempt, 2**18).best == memory.longest


def test_nothing_fits() -> None:
    found = find_longest(Memory(50.0, 1.0, 40.0).attempt, 4096)
    assert found == Longest(found.attempts, proved=True)
    assert found.best == 0
    assert found.too_long == STEP


def test_time_that_runs_out_is_said() -> None:
    found = find_longest(Memory(24.0, 0.25, 139.0).attempt, 65536, limit=1e-4)
    assert [one.tokens for one in found.attempts] == [65536]
    assert not found.proved
    assert found.best == 65536


@pytest.mark.parametrize("precision", [0.5, 0.001])
def test_precision_is_kept(precision: float) -> None:
    memory = Memory(24.0, 0.05, 139.0)
    found = find_longest(memory.attempt, 65536, precision=precision)
    assert memory.longest - found.best <= max(STEP, precision * memory.longest)
