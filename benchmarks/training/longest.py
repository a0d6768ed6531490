"""The longest stream that a row can train on: found by steps with dry attention, which take their memory and no more.

The next length is where the peaks so far, which grow evenly with the length, meet the memory that there is; between a
length that fits and one that does not, never outside.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

STEP = 1024  # tokens; lengths are multiples of it


@dataclass(frozen=True)
class Attempt:
    """One length. `peak` and `room`, what may be allocated, are in GiB; a peak of None did not fit, for the reason in
    `failure`."""

    tokens: int
    peak: float | None
    room: float
    seconds: float
    failure: str = ""


@dataclass
class Longest:
    """What a search found.

    Arguments:
        proved: the lengths above `best` that were tried did not fit, up to the precision; else time ran out.
    """

    attempts: list[Attempt] = field(default_factory=list)
    proved: bool = False

    @property
    def fitting(self) -> list[Attempt]:
        return sorted((one for one in self.attempts if one.peak is not None), key=lambda one: one.tokens)

    @property
    def best(self) -> int:
        """Tokens of the longest that fits, 0 if none did."""
        return self.fitting[-1].tokens if self.fitting else 0

    @property
    def too_long(self) -> int | None:
        """Tokens of the shortest that does not."""
        return min((one.tokens for one in self.attempts if one.peak is None), default=None)


def find_longest(
    attempt: Callable[[int], Attempt], first: int, precision: float = 0.03, limit: float = 3600.0
) -> Longest:
    """Tries lengths until the longest that fits is known to `precision`, as a share of it.

    Arguments:
        attempt: tries a number of tokens.
        first: where to begin.
        limit: seconds; an attempt that would end after that, as the ones before say, is not begun.
    """
    found, began = Longest(), time.monotonic()
    tokens: int | None = max(STEP, first // STEP * STEP)
    while tokens is not None:
        if found.attempts and time.monotonic() - began + expected_seconds(found, tokens) > limit:
            return found
        found.attempts.append(attempt(tokens))
        tokens = next_length(found, precision)
    found.proved = True
    return found


def next_length(found: Longest, precision: float) -> int | None:
    """Tokens to try next, or None if it is known well enough."""
    low, high, fitting = found.best, found.too_long, found.fitting
    if high is not None and high - low <= max(STEP, precision * low):
        return None
    if len(fitting) < 2:
        return _rounded(2 * low if high is None else (low + high) / 2, low, high)
    # Memory in pieces is never used up: a little below of where the peaks meet it, and once that fits, above.
    aim, step = meeting(fitting[-2], fitting[-1]) * (1 - precision / 3), precision * low
    if high is None:
        return _rounded(min(4.0 * low, max(aim, low + step)), low, high)
    aim = max(aim, low + step / 2)
    if aim >= high:  # the peaks promise too much: a step back, twice as far each time
        failures = len(found.attempts) - len(fitting)
        aim = max(high * (1 - 0.9 * precision * 2 ** (failures - 1)), (low + high) / 2)
    return _rounded(aim, low, high)


def meeting(before: Attempt, last: Attempt) -> float:
    """Tokens at which a peak that grows as between these two is all that there is."""
    assert before.peak is not None
    assert last.peak is not None
    slope = (last.peak - before.peak) / (last.tokens - before.tokens)
    return last.tokens + (last.room - last.peak) / slope if slope > 0 else 2.0 * last.tokens


def _rounded(tokens: float, low: int, high: int | None) -> int | None:
    """A multiple of STEP between two others, or None if there is none."""
    rounded = max(low + STEP, int(tokens) // STEP * STEP)
    return None if high is not None and rounded >= high else rounded


def expected_seconds(found: Longest, tokens: int) -> float:
    """Of an attempt at this length, as long as the slowest so far for each token, or as any."""
    return max(one.seconds * max(1.0, tokens / one.tokens) for one in found.attempts)
