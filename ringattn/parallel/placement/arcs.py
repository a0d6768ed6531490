"""A document among several, where its cost per token rises and falls: each takes an arc of what is left of it.

Lay the tokens that are left on a circle. The arcs of n tokens cost on the mean what n tokens do on the mean, and their
cost changes little from one arc to the next: so at one place it is exactly that. Taken out, the arc leaves a circle
again, in which the tokens that are left cost the same on the mean. The first arc is one run of the document, and each
later one two at most where it spans the hole that those before it left, or the document's ends.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate

from ringattn.kernels.spec import Range

PLACES = 8  # at which arcs are tried first, beside those at ends of runs

Pieces = list[tuple[int, int, int]]  # (position, first, last)


def arcs(size: int, owners: Sequence[tuple[int, int]], tile: int, before: Callable[[int], float]) -> Pieces:
    """Who has which tokens of a document, the largest share first.

    Arguments:
        owners: `(position, tokens)` of each, in all `size`.
        tile: rows that arcs begin at multiples of.
        before: the cost of all tokens before one.
    """
    left: list[Range] = [(0, size)]
    pieces: Pieces = []
    order = sorted(owners, key=lambda share: (-share[1], share[0]))
    for position, tokens in order[:-1]:
        taken, left = _cut(left, _place(left, tokens, tile, before), tokens)
        pieces += [(position, *run) for run in taken]
    return pieces + [(position, *run) for position, _ in order[-1:] for run in left]


def _place(left: list[Range], tokens: int, tile: int, before: Callable[[int], float]) -> int:
    """Where the arc of so many tokens begins that costs what they do on the mean, in tokens of the runs left."""
    ends = [0, *accumulate(stop - start for start, stop in left)]
    total = ends[-1]

    def cost(runs: list[Range]) -> float:
        return sum(before(stop) - before(start) for start, stop in runs)

    goal = cost(left) * tokens / total
    above = cache(lambda place: cost(_cut(left, place * tile, tokens)[0]) - goal)
    tried = {begin % total // tile for end in ends for begin in (end, end - tokens, end - tokens // 2)}
    tried |= {number * total // PLACES // tile for number in range(PLACES)}
    low, high = min(sorted(tried), key=above), max(sorted(tried), key=above)
    if above(low) > 0 or above(high) < 0:  # costs that rise and fall many times
        low, high = min(range(-(-total // tile)), key=above), max(range(-(-total // tile)), key=above)
    while abs(high - low) > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if above(middle) < 0 else (low, middle)
    return min((low, high), key=lambda place: abs(above(place))) * tile


def _cut(left: list[Range], begin: int, tokens: int) -> tuple[list[Range], list[Range]]:
    """The runs of an arc of what is left, and those of the rest."""
    total = sum(stop - start for start, stop in left)
    spans = [(begin, min(begin + tokens, total))]
    if begin + tokens > total:
        spans.insert(0, (0, begin + tokens - total))
    taken: list[Range] = []
    rest: list[Range] = []
    passed = 0
    for start, stop in left:
        at = start
        for first, last in spans:
            low, high = max(start + first - passed, start), min(start + last - passed, stop)
            if low < high:
                taken.append((low, high))
                if at < low:
                    rest.append((at, low))
                at = high
        if at < stop:
            rest.append((at, stop))
        passed += stop - start
    return taken, rest
