"""A preflight, step by step, on one of its nodes. Every wait ends, and who is waited for in vain is remembered."""

import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringattn.preflight import between
from ringattn.preflight.meeting import Meeting, NotThere, meet
from ringattn.preflight.node import examine
from ringattn.preflight.pairs import rounds
from ringattn.preflight.ranks import Doctor, RankProcess, start_ranks, wait_for_all

ROUND_SECONDS = 2.0  # that a link may take more, for connections that are opened and messages that are sent
BYE = 10.0


@dataclass(frozen=True)
class Options:
    """What is looked at, and from where.

    Arguments:
        node, nodes: number of this node, and how many there should be.
        endpoint: HOST:PORT of node 0; None for one node alone.
        name: tells preflights at one endpoint apart.
        device: "cuda" or "cpu".
        ranks: devices of this node.
        output, cache: folders that a run would write to.
        seconds: how long each step is waited for.
    """

    node: int
    nodes: int
    endpoint: str | None
    name: str
    device: str
    ranks: int
    output: Path
    cache: Path
    seconds: float


def look(options: Options) -> tuple[Meeting, dict[int, Any]]:
    """What the nodes meet by, and all reports by node on node 0, this node's own on the others.

    Raises NotThere if node 0 does not answer, or went on without this node.
    """
    with ExitStack() as stack:
        ranks = start_ranks(options.device, options.ranks)
        for rank in ranks:
            stack.callback(rank.close)
        meeting = meet(options.node, options.nodes, options.endpoint, options.name, options.seconds)
        report = examine(options.output, options.cache)
        door = between.Door(meeting)
        stack.callback(door.close)
        roster = _roster(meeting, {"host": report["host"], "door": [meeting.address, door.port]}, options.seconds)
        report["address"], report["wide"] = meeting.address, meeting.wide
        report |= _together(meeting, roster, options)
        passed = wait_for_all(ranks, "product", time.monotonic() + options.seconds)
        doctor = Doctor(options.device)  # only now: the memory of its device was full
        stack.callback(doctor.close)
        report["kernels"] = doctor.report(time.monotonic() + options.seconds)
        _links(meeting, roster, ranks, passed, report, options)
        report["ranks"] = [rank.report() for rank in ranks]
        meeting.say(f"report/{meeting.node}", report)
        if meeting.node:
            return meeting, {meeting.node: report}
        reports = meeting.hear_all("report", roster, time.monotonic() + options.seconds)
        _note_clocks(reports, report["clocks"])
        return meeting, reports


def _roster(meeting: Meeting, me: dict[str, Any], seconds: float) -> dict[int, Any]:
    """Who came, by number; node 0 waits for all and then goes on with those that are there."""
    meeting.say(f"here/{meeting.node}", me)
    if meeting.node == 0:
        here = meeting.hear_all("here", range(meeting.nodes), time.monotonic() + seconds)
        meeting.say("roster", here)
        return here
    try:
        roster = meeting.hear("roster", time.monotonic() + 2 * seconds)
    except NotThere as error:
        raise NotThere("node 0 does not say who came") from error
    here = {int(node): told for node, told in roster.items()}
    if meeting.node not in here:
        raise NotThere(f"the others went on without node {meeting.node}, which came too late")
    return here


def _together(meeting: Meeting, roster: dict[int, Any], options: Options) -> dict[str, Any]:
    """Shared folder, clocks and doors."""
    others = [node for node in roster if node != meeting.node]
    found: dict[str, Any] = {"unsigned": None, "unseen": [], "clocks": {}, "unreached": {}}
    if not others:
        return found
    found["unsigned"] = between.write_sign(meeting, options.output)
    meeting.say(f"signed/{meeting.node}", found["unsigned"])
    signed = meeting.hear_all("signed", others, time.monotonic() + options.seconds)
    found["unseen"] = between.see_signs(meeting, options.output, [node for node, why in signed.items() if why is None])
    if meeting.node == 0:
        found["clocks"] = between.ask_clocks(meeting, others, time.monotonic() + options.seconds)
    else:
        with suppress(NotThere):  # what node 0 does next shows whether it is still there
            between.answer_clock(meeting, time.monotonic() + 2 * options.seconds)
    unreached = between.knock({node: tuple(roster[node]["door"]) for node in others})
    found["unreached"] = {str(node): why for node, why in unreached.items()}
    return found


def _links(
    meeting: Meeting,
    roster: dict[int, Any],
    ranks: list[RankProcess],
    passed: bool,
    report: dict[str, Any],
    options: Options,
) -> None:
    """Measures links among the nodes whose devices passed and that all reach each other."""
    meeting.say(f"ready/{meeting.node}", {"ranks": len(ranks) if passed else 0, "unreached": report["unreached"]})
    if meeting.node == 0:
        ready = meeting.hear_all("ready", roster, time.monotonic() + 3 * options.seconds)
        meeting.say("links", connected(ready))
        between.remove_signs(meeting, options.output)
    try:
        part = meeting.hear("links", time.monotonic() + 4 * options.seconds)
    except NotThere as error:
        raise NotThere("node 0 does not say whose links are measured") from error
    report["linked_nodes"] = part["nodes"]
    if meeting.node not in part["nodes"] or sum(part["counts"]) < 2:
        return
    seconds = options.seconds / 2  # the group gives up first, and can say of whom
    for rank in ranks:
        place = {"node": part["nodes"].index(meeting.node), "local": rank.number, "counts": part["counts"]}
        where = {"host": meeting.host, "port": meeting.port, "prefix": f"{meeting.prefix}/links"}
        rank.measure_links({**place, **where, "seconds": seconds})
    wait_for_all(ranks, "done", time.monotonic() + options.seconds + ROUND_SECONDS * rounds(part["counts"]))


def connected(ready: dict[int, Any]) -> dict[str, list[int]]:
    """The largest part of the nodes that is easily found in which all devices passed and everybody reaches everybody.

    Whoever has most connections that fail is left out first.
    """
    left = {node: told["ranks"] for node, told in ready.items() if told["ranks"]}
    broken = {frozenset((node, int(other))) for node, told in ready.items() for other in told["unreached"]}
    while among := [pair for pair in broken if pair <= left.keys()]:
        del left[max(left, key=lambda node: (sum(node in pair for pair in among), node))]
    return {"nodes": list(left), "counts": list(left.values())}


def _note_clocks(reports: dict[int, Any], clocks: dict[int, Any]) -> None:
    """Puts what node 0 measured to the nodes that it is about."""
    for node, report in reports.items():
        report["clock"] = {"ahead": 0.0, "error": 0.0} if node == 0 else clocks.get(node)


def tell_verdict(meeting: Meeting, verdict: dict[str, Any] | None, roster: list[int], seconds: float) -> dict[str, Any]:
    """Node 0 gives its verdict to the others and waits until they have it. Raises NotThere if node 0 gives none."""
    if meeting.node == 0:
        assert verdict is not None
        meeting.say("verdict", verdict)
        meeting.hear_all("bye", [node for node in roster if node], time.monotonic() + BYE)
        return verdict
    try:
        heard: dict[str, Any] = meeting.hear("verdict", time.monotonic() + 3 * seconds)
    except NotThere as error:
        raise NotThere("node 0 gives no verdict") from error
    meeting.say(f"bye/{meeting.node}", 0)
    return heard
