"""What a check of a preflight says, and who is to blame for what several nodes complain of. Pure."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ringattn.parallel.machine.machine import Machine

GIB = 1 << 30


@dataclass(frozen=True)
class Problem:
    """Something wrong, in a sentence, and the nodes that it is the fault of, as far as that is known."""

    text: str
    nodes: tuple[int, ...] = ()


@dataclass
class Check:
    """One line of the page: what was looked at, what was seen, what is wrong with it and what is only odd."""

    name: str
    seen: str = ""
    problems: list[Problem] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Bounds:
    """What counts as wrong.

    Arguments:
        nodes: that should be there, with their names where those are known.
        device: "cuda" or "cpu".
        machine: whose speed is expected; None: none is known, and devices and links are compared with each other only.
        slow: share of the expected or usual speed below which something is slow.
        free: bytes that the output folder needs.
    """

    nodes: tuple[str, ...]
    device: str
    machine: Machine | None
    slow: float
    free: int


def label(reports: dict[int, Any], node: int) -> str:
    return f"node {node} ({reports[node]['host']})" if node in reports else f"node {node}"


def usual(values: Any) -> Any:
    """What most say; of equally many the first."""
    return Counter(values).most_common(1)[0][0]


def common(nodes: Iterable[int], pairs: Sequence[tuple[int, int]]) -> list[int]:
    """The nodes that pairs with a fault have in common: each is in the faults with most of the other nodes.

    Whoever explains most pairs is blamed first, and what is left has to be explained by others. One pair alone, as all
    are between two nodes, says nothing about which of both it is.
    """
    left, others, blamed = {frozenset(pair) for pair in pairs}, len(list(nodes)) - 1, []
    while left:
        node, count = Counter(node for pair in sorted(map(sorted, left)) for node in pair).most_common(1)[0]
        if count < 2 or 2 * count <= others:
            break
        blamed.append(node)
        left = {pair for pair in left if node not in pair}
    return blamed
