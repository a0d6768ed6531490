"""Rounds of pairs: everybody meets everybody once, at the same time as the other does."""

import pytest

from ringattn.parallel.mesh.tournament import opponents
from ringattn.preflight.pairs import Place


@pytest.mark.parametrize("counts", [(1,), (2,), (5,), (1, 1), (2, 2), (2, 2, 2), (4, 4, 4, 4, 4), (2, 3, 1)], ids=str)
def test_every_pair_is_measured_once_and_nobody_waits_in_a_circle(counts):
    """Ranks that go through their lists, each waiting for its next peer, all come to the end."""
    places = [Place(node, local, counts) for node, count in enumerate(counts) for local in range(count)]
    assert [place.rank for place in places] == list(range(sum(counts)))
    left = {place.rank: [peer.rank for peer in place.peers()] for place in places}
    met = []
    while any(left.values()):
        pairs = {(a, peers[0]) for a, peers in left.items() if peers and left[peers[0]][:1] == [a] and a < peers[0]}
        assert pairs, f"all wait: {left}"
        for a, b in pairs:
            left[a].pop(0)
            left[b].pop(0)
        met += pairs
    expected = [
        (a.rank, b.rank) for a in places for b in places if a.rank < b.rank and (a.node == b.node or a.local == b.local)
    ]
    assert sorted(met) == expected


@pytest.mark.parametrize("players", range(2, 9))
def test_a_round_robin_has_as_few_rounds_as_there_can_be(players):
    """With an even number nobody ever rests: all lists are of full length and pair up column by column."""
    lists = [opponents(player, players) for player in range(players)]
    assert all(len(found) == players - 1 for found in lists)
    if players % 2 == 0:
        for turn in range(players - 1):
            assert all(lists[lists[player][turn]][turn] == player for player in range(players))
