"""Rounds of transfers: what one rank sends another expects, and every piece ends with all pieces before it, once."""

from hypothesis import given
from hypothesis import strategies as st

from ringattn.recurrent.rounds import Place, base_of, is_state, plan_rounds, taken
from ringattn.recurrent.rounds import given as given_to


@st.composite
def chains(draw: st.DrawFn) -> tuple[int, list[list[Place]]]:
    """Documents over ranks in any order; every piece has a number of its own on its rank."""
    ranks = draw(st.integers(1, 12))
    held = [0] * ranks
    found = []
    for holders in draw(st.lists(st.lists(st.integers(0, ranks - 1), min_size=2, max_size=40), max_size=4)):
        found.append([(rank, held[rank] + sum(one == rank for one in holders[:at])) for at, rank in enumerate(holders)])
        held = [count + holders.count(rank) for rank, count in enumerate(held)]
    return ranks, found


@given(case=chains(), rounds=st.integers(1, 7))
def test_every_piece_composes_all_before_it_once(case: tuple[int, list[list[Place]]], rounds: int) -> None:
    """Walked with strings of positions for states: order and completeness show."""
    ranks, documents = case
    plans = [plan_rounds(documents, rank, ranks, rounds) for rank in range(ranks)]
    # What every piece holds: the positions that it covers, and whether it is asked for a map.
    where = {place: (document, at) for document, chain in enumerate(documents) for at, place in enumerate(chain)}
    states = {place: [where[place]] for place in where}
    maps = {place: [where[place]] for place, (document, at) in where.items() if 0 < at < len(documents[document]) - 1}
    found: dict[Place, list[tuple[int, int]]] = {}
    for number in range(rounds):
        before = dict(states), dict(maps)
        for rank in range(ranks):
            one = plans[rank][number]
            for other in range(ranks):
                assert one.sends[other] == plans[other][number].receives[rank]
            arrived = [
                [before[kind][other, piece] for other, parcel in enumerate(one.receives) for piece in parcel[1 - kind]]
                for kind in (0, 1)
            ]
            for step in one.steps:
                for take in step:
                    place, values = (rank, take.piece), arrived[0][take.state]
                    if number == rounds - 1:
                        held = found.get(place, [])
                        assert (take.map is None) == (not held)
                        assert take.map is None or arrived[1][take.map] == values
                        found[place] = held + values
                        continue
                    states[place] = values + states[place]
                    if take.map is not None:
                        maps[place] = arrived[1][take.map] + maps[place]
                        assert maps[place] == states[place]
    for place, (document, at) in where.items():
        assert found.get(place, []) == [(document, position) for position in range(at)]


@given(pieces=st.integers(2, 300), rounds=st.integers(1, 9))
def test_a_base_is_the_least_that_reaches(pieces: int, rounds: int) -> None:
    base = base_of(pieces, rounds)
    assert base**rounds >= pieces - 1
    assert base == 1 or (base - 1) ** rounds < pieces - 1
    most = (rounds - 1) * (base - 1) + base
    for position in range(pieces):
        assert sum(len(taken(pieces, position, rounds, number)) for number in range(rounds)) <= most


@given(pieces=st.integers(2, 60), rounds=st.integers(1, 7), data=st.data())
def test_given_is_taken(pieces: int, rounds: int, data: st.DataObject) -> None:
    number = data.draw(st.integers(0, rounds - 1))
    takes = {(giver, taker) for taker in range(pieces) for giver in taken(pieces, taker, rounds, number)}
    assert takes == {(giver, taker) for giver in range(pieces) for taker in given_to(pieces, giver, rounds, number)}
    assert all(
        not is_state(pieces, giver, rounds, number) for giver, _ in takes if giver >= base_of(pieces, rounds) ** number
    )


def test_a_long_document_of_many_ranks() -> None:
    """512 pieces of 256 ranks, as a zigzag lays them: nine rounds of a few arrivals, in place of one of 511."""
    chain = [(rank, 0) for rank in range(256)] + [(rank, 1) for rank in reversed(range(256))]
    for rank in (0, 17, 255):
        once, doubled = (plan_rounds([chain], rank, 256, rounds) for rounds in (1, 9))
        assert sum(len(parcel.states) for parcel in once[0].receives) >= 256
        assert max(sum(len(parcel.states) for parcel in one.receives) for one in doubled) <= 4
