"""Who measures a link with whom, and when: every pair once, in rounds of pairs that share nobody. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ringattn.parallel.mesh.tournament import opponents


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


def rounds(counts: Sequence[int]) -> int:
    """How many rounds there are at most, for the time that they may take."""
    return max(counts) + len(counts)
