"""Who measures a link with whom, and when: every pair once, in rounds of pairs that share nobody. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A rank among the nodes.

    Arguments:
        node: number of the node among those that take part.
        local: number of the rank on its node.
        counts: ranks of each node.
    """

    node: int
    local: int
    counts: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Among all, node after node."""
        return sum(self.counts[: self.node]) + self.local

    def peers(self) -> Iterator["Place"]:
        """Every rank of its own node, then the rank of the same place on every other node, round by round.

        Devices of one place share a rail of the network, and a ring across nodes joins just them, so the links between
        nodes are as many as the nodes have rails. Both sides of a pair name each other in the same round.
        """
        for mate in opponents(self.local, self.counts[self.node]):
            yield Place(self.node, mate, self.counts)
        for other in opponents(self.node, len(self.counts)):
            if self.local < self.counts[other]:
                yield Place(other, self.local, self.counts)


def opponents(player: int, players: int) -> list[int]:
    """The others in the order of a round-robin tournament: in each round everybody meets at most one.

    The circle method: with an odd number of players one rests in every round.
    """
    seats = players + players % 2
    if seats < 2:
        return []
    found = []
    for turn in range(seats - 1):
        if player == seats - 1:
            other = turn * (seats // 2) % (seats - 1)
        else:
            other = (turn - player) % (seats - 1)
            other = seats - 1 if other == player else other
        if other < players:
            found.append(other)
    return found


def rounds(counts: Sequence[int]) -> int:
    """How many rounds there are at most, for the time that they may take."""
    return max(counts) + len(counts)
