"""The rounds in which the pieces of a document tell each other what they make of the state. Pure integers.

The pieces of a cut document are a chain, and each needs the composition of all that stand before it. In one round
every piece takes the maps of all before it: n pieces, n²/2 transfers. In several rounds, as in a scan by doubling
(Hillis and Steele, "Data parallel algorithms", 1986, with any base), a piece takes b - 1 compositions of pieces before
it, so that what it holds grows b-fold, and in the last round those that tile the rest of the document:

    round, base 3    held before        piece i takes what is held at
    1                itself             i - 1, i - 2
    2                3 pieces           i - 3, i - 6
    3, the last      9 pieces           i - 1, i - 10, i - 19, which is all before i

With K rounds the base is the K-th root of n, and a piece takes (K - 1)(b - 1) + b. Whatever begins at the document's
head is a state and no map: its matrix does not travel. So the first piece never gives one, and the last gives nothing.

For bytes, see `ringattn.recurrent.price`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

Place = tuple[int, int]  # a rank, and the number of one of its cut pieces


class Take(NamedTuple):
    """A piece of this rank composes with one arrival.

    Arguments:
        piece: its number among the cut pieces.
        state, map: numbers among the arrived states and maps; no map where the state is complete.
    """

    piece: int
    state: int
    map: int | None


class Parcel(NamedTuple):
    """Numbers of the cut pieces whose maps, and of those whose states, one rank sends another."""

    maps: tuple[int, ...]
    states: tuple[int, ...]


@dataclass(frozen=True)
class Round:
    """What one rank does in a round.

    Arguments:
        sends: for every rank; what is held is what was composed in the rounds before.
        receives: of every rank; numbers of arrivals count through them in order.
        steps: what is composed at once, step after step: from the nearest piece to the farthest, in the last round from
            the farthest to the nearest.
    """

    sends: tuple[Parcel, ...]
    receives: tuple[Parcel, ...]
    steps: tuple[tuple[Take, ...], ...]


@cache
def base_of(pieces: int, rounds: int) -> int:
    """The least whole number whose power reaches all pieces before the last one."""
    base = max(1, round((pieces - 1) ** (1 / rounds)) - 1)
    while base**rounds < pieces - 1:
        base += 1
    return base


def taken(pieces: int, position: int, rounds: int, number: int) -> range:
    """The positions whose composition a piece takes in a round, the nearest first."""
    base = base_of(pieces, rounds)
    width = base**number
    if number == rounds - 1:
        return range(position - 1, -1, -width)
    if position == pieces - 1:  # it gives nothing, and need not hold anything
        return range(0)
    return range(position - width, max(-1, position - base * width), -width)


def given(pieces: int, position: int, rounds: int, number: int) -> range:
    """The positions that take what a piece holds in a round: those whose `taken` names it."""
    base = base_of(pieces, rounds)
    width = base**number
    if number == rounds - 1:
        return range(position + 1, pieces, width)
    return range(position + width, min(pieces - 1, position + base * width), width)


def is_state(pieces: int, position: int, rounds: int, number: int) -> bool:
    """Whether what a piece holds before a round begins at the document's head."""
    return position < base_of(pieces, rounds) ** number


def plan_rounds(chains: Sequence[Sequence[Place]], rank: int, ranks: int, rounds: int) -> tuple[Round, ...]:
    """A rank's part in every round; chains in the order in which states walk through them."""
    return tuple(_round(chains, rank, ranks, rounds, number) for number in range(rounds))


def _round(chains: Sequence[Sequence[Place]], rank: int, ranks: int, rounds: int, number: int) -> Round:
    out: list[tuple[set[int], set[int]]] = [(set(), set()) for _ in range(ranks)]
    arriving: list[tuple[set[int], set[int]]] = [(set(), set()) for _ in range(ranks)]
    takes: list[tuple[int, list[tuple[Place, bool]]]] = []
    for chain in chains:
        pieces = len(chain)
        for position, (holder, piece) in enumerate(chain):
            if holder != rank:
                continue
            complete = is_state(pieces, position, rounds, number)
            for taker in given(pieces, position, rounds, number):
                _add(out[chain[taker][0]], piece, complete)
            found = [
                (chain[other], is_state(pieces, other, rounds, number))
                for other in taken(pieces, position, rounds, number)
            ]
            for (giver, other), whole in found:
                _add(arriving[giver], other, whole)
            takes.append((piece, found[::-1] if number == rounds - 1 else found))
    receives = _parcels(arriving)
    maps, states = ({place: at for at, place in enumerate(_places(receives, kind))} for kind in (0, 1))
    steps = [
        tuple(
            Take(piece, states[found[depth][0]], None if found[depth][1] else maps[found[depth][0]])
            for piece, found in takes
            if len(found) > depth
        )
        for depth in range(max((len(found) for _, found in takes), default=0))
    ]
    return Round(_parcels(out), receives, tuple(steps))


def _add(parcel: tuple[set[int], set[int]], piece: int, complete: bool) -> None:
    maps, states = parcel
    states.add(piece)
    if not complete:
        maps.add(piece)


def _parcels(found: Sequence[tuple[set[int], set[int]]]) -> tuple[Parcel, ...]:
    return tuple(Parcel(tuple(sorted(maps)), tuple(sorted(states))) for maps, states in found)


def _places(parcels: Sequence[Parcel], kind: int) -> list[Place]:
    return [(rank, piece) for rank, parcel in enumerate(parcels) for piece in parcel[kind]]
