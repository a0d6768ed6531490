"""What healthy nodes would tell, for tests to break."""

from collections.abc import Sequence
from typing import Any

from ringattn.preflight.checks import Bounds
from ringattn.preflight.pairs import Place

GIB = 1 << 30
SIZE = 1 << 20


def healthy(nodes: int = 4, ranks: int = 2) -> dict[int, Any]:
    """Reports by node: links of 1 GB/s inside and 0.5 GB/s between nodes, 50 µs."""
    return {node: _node(node, nodes, ranks) for node in range(nodes)}


def _node(node: int, nodes: int, ranks: int) -> dict[str, Any]:
    folder = {"path": "/shared/out", "free": 100 * GIB, "error": None}
    return {
        "host": f"host{node}",
        "versions": {"python": "3.12.1", "torch": "2.13.0", "nccl": None},
        "environment": {"NCCL_DEBUG": "WARN"},
        "limits": {"open_files": 65536, "locked_memory": None, "shared_memory": 8 * GIB, "infiniband": 8},
        "folders": {"output": dict(folder), "cache": dict(folder)},
        "unsigned": None,
        "unseen": [],
        "unreached": {},
        "clock": {"ahead": 0.001 * node, "error": 0.0001},
        "wide": False,
        "kernels": {"auto": "fa4", "problem": None},
        "linked_nodes": list(range(nodes)),
        "ranks": [_rank(Place(node, local, (ranks,) * nodes)) for local in range(ranks)],
    }


def _rank(place: Place) -> dict[str, Any]:
    links = []
    for peer in place.peers():
        bandwidth = 1e9 if peer.node == place.node else 0.5e9
        links.append({"peer": [peer.node, peer.local], "small": 5e-5, "large": SIZE / bandwidth, "bytes": SIZE})
    return {
        "number": place.local,
        "device": "GPU",
        "memory": {"bytes": 64 * GIB, "wrong": 0},
        "product": {"digest": "abc", "same": True, "seconds": 1e-3, "flops": 1e12},
        "links": links,
        "waits_for": None,
        "error": None,
    }


def bounds(nodes: int | Sequence[str] = 4, **changes: Any) -> Bounds:
    names = ("",) * nodes if isinstance(nodes, int) else tuple(nodes)
    given = {"nodes": names, "device": "cuda", "machine": None, "slow": 0.5, "free": 10 * GIB}
    return Bounds(**(given | changes))


def slowed(reports: dict[int, Any], a: tuple[int, int], b: tuple[int, int], factor: float, what: str = "large") -> None:
    """Makes a link slower, as both of its ranks measure it."""
    for (node, local), peer in ((a, b), (b, a)):
        for link in reports[node]["ranks"][local]["links"]:
            if link["peer"] == list(peer):
                link[what] *= factor
