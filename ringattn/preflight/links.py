"""Which links are slow or dead, compared with each other and with the speeds that plans are made for. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from ringattn.parallel.machine.machine import Link
from ringattn.preflight.checks import Bounds, Check, Problem, common, label
from ringattn.preflight.rank import SMALL

Rank = tuple[int, int]  # node, number on it
HARMLESS = {"cuda": 1e-4, "cpu": 1e-3}  # seconds that a latency may differ from the usual one
MOST = 8  # problems of one kind that a page holds


@dataclass(frozen=True)
class Measured:
    """One link: its two ranks, the seconds of a small and of a large message in both directions, and the bytes of the
    large one."""

    a: Rank
    b: Rank
    small: float
    large: float
    size: int

    @property
    def bandwidth(self) -> float:
        return self.size / self.large


def check_links(reports: dict[int, Any], bounds: Bounds) -> list[Check]:
    """A check of the links inside nodes, one of those between nodes, and one of what did not answer."""
    links = list(measured(reports))
    inside = [link for link in links if link.a[0] == link.b[0]]
    between = [link for link in links if link.a[0] != link.b[0]]
    checks = []
    for name, kind, some in (("links inside", "node", inside), ("links between", "network", between)):
        expected = bounds.machine.links[kind, "p2p"] if bounds.machine else None
        checks.append(check_speeds(name, some, expected, reports, bounds))
    return [*checks, check_answers(reports)]


def measured(reports: dict[int, Any]) -> Iterator[Measured]:
    """Every link once, with the times of the slower side."""
    found: dict[tuple[Rank, Rank], Any] = {}
    for node, report in reports.items():
        for rank in report["ranks"]:
            for link in rank["links"]:
                peer = (report["linked_nodes"][link["peer"][0]], link["peer"][1])
                found.setdefault(tuple(sorted([(node, rank["number"]), peer])), []).append(link)  # type: ignore[arg-type]
    for (a, b), sides in sorted(found.items()):
        small, large = (max(side[size] for side in sides) for size in ("small", "large"))
        yield Measured(a, b, small, large, sides[0]["bytes"])


def check_speeds(
    name: str, links: list[Measured], expected: Link | None, reports: dict[int, Any], bounds: Bounds
) -> Check:
    check = Check(name)
    if not links:
        return check
    usual = median(link.large for link in links), median(link.small for link in links)
    slow = {link: why for link in links if (why := slowness(link, usual, expected, bounds))}
    rates, delays = sorted(link.bandwidth for link in links), sorted(link.small for link in links)
    check.seen = f"{len(links)} pairs, {speed(rates[0])} to {speed(rates[-1])}, "
    check.seen += f"latency {delays[0] * 1e6:.0f} to {delays[-1] * 1e6:.0f} µs"
    if expected is not None:
        check.seen += f"; expected {speed(expected.bandwidth)}"
    across = {link for link in slow if link.a[0] != link.b[0]}
    blamed = common(reports, [(link.a[0], link.b[0]) for link in across])
    for node in blamed:
        its = [link for link in slow if link in across and node in (link.a[0], link.b[0])]
        worst = max(its, key=lambda link: link.large)
        devices = sorted({rank[1] for link in its for rank in (link.a, link.b) if rank[0] == node})
        text = f"{label(reports, node)}: its links to {len(others(its, node))} other nodes are slow, "
        text += f"of its devices {', '.join(map(str, devices))}: {slow[worst]}"
        check.problems.append(Problem(text, (node,)))
    rest = [link for link in slow if link not in across or not {link.a[0], link.b[0]} & set(blamed)]
    for link in rest[:MOST]:
        at_fault = (link.a[0],) if link.a[0] == link.b[0] else ()
        check.problems.append(Problem(f"{ends(reports, link.a, link.b)}: {slow[link]}", at_fault))
    if len(rest) > MOST:
        check.problems.append(Problem(f"and {len(rest) - MOST} more"))
    return check


def slowness(link: Measured, usual: tuple[float, float], expected: Link | None, bounds: Bounds) -> str:
    """What is slow about a link, or nothing."""
    if expected is not None:
        if expected.latency + link.size / expected.bandwidth < bounds.slow * link.large:
            return f"{speed(link.bandwidth)}, expected {speed(expected.bandwidth)}"
        late = expected.latency + SMALL / expected.bandwidth
        if late < bounds.slow * link.small and link.small - late > HARMLESS[bounds.device]:
            return f"latency {link.small * 1e6:.0f} µs, expected {late * 1e6:.0f} µs"
    large, small = usual
    if large < bounds.slow * link.large:
        return f"{speed(link.bandwidth)}, usual here are {speed(link.size / large)}"
    if small < bounds.slow * link.small and link.small - small > HARMLESS[bounds.device]:
        return f"latency {link.small * 1e6:.0f} µs, usual here are {small * 1e6:.0f} µs"
    return ""


def check_answers(reports: dict[int, Any]) -> Check:
    """Ranks that waited for each other in vain; where there are any, what others met came of that."""
    check, waiting = Check("answers"), {}
    for node, report in reports.items():
        for rank in report["ranks"]:
            if rank["error"] and rank["product"] is not None:
                peer = rank["waits_for"] and (report["linked_nodes"][rank["waits_for"][0]], rank["waits_for"][1])
                waiting[node, rank["number"]] = (peer, rank["error"])
    mutual = sorted(
        (a, b) for a, (b, _) in waiting.items() if b is not None and b in waiting and waiting[b][0] == a and a < b
    )
    blamed = common(reports, [(a[0], b[0]) for a, b in mutual if a[0] != b[0]])
    for a, b in mutual[:MOST]:
        at_fault = tuple({a[0], b[0]} & set(blamed)) or ((a[0],) if a[0] == b[0] else ())
        check.problems.append(Problem(f"{ends(reports, a, b)}: no answer ({waiting[a][1]})", at_fault))
    if not mutual:
        for (node, number), (_, error) in list(waiting.items())[:MOST]:
            check.problems.append(Problem(f"{label(reports, node)}, device {number}, links: {error}"))
    return check


def ends(reports: dict[int, Any], a: Rank, b: Rank) -> str:
    if a[0] == b[0]:
        return f"{label(reports, a[0])}, between devices {a[1]} and {b[1]}"
    return f"between {label(reports, a[0])} and {label(reports, b[0])}, devices {a[1]} and {b[1]}"


def others(links: list[Measured], node: int) -> set[int]:
    return {rank[0] for link in links for rank in (link.a, link.b)} - {node}


def speed(bandwidth: float) -> str:
    return f"{bandwidth / 1e9:.3g} GB/s" if bandwidth >= 1e8 else f"{bandwidth / 1e6:.3g} MB/s"
