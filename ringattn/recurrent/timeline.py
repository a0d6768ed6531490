"""When each rank computes and waits in a layer that carries a state: all ranks played through, from integers.

As the routes do it (`scan`, `exchange`), and at the rates of `ringattn.recurrent.price`, which are not calibrated. What
composes maps is small beside what makes them, and is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ringattn.parallel.layout import Layout
from ringattn.parallel.machine.machine import Machine, transfer_seconds
from ringattn.parallel.simulation.spans import PASSES, Pass, Span
from ringattn.recurrent.exchange import head_shares
from ringattn.recurrent.plan import plan_recurrence
from ringattn.recurrent.price import RecurrenceShape, dealt_bytes, gathered_bytes, kernel_seconds, map_share

# Stages of the scan's kernels; the exchange has one.
WHOLE, MAPS, CUT = range(3)
TOLD = {
    ("scan", "forward"): "0 whole documents, 1 maps of cut pieces, 2 these",
    ("scan", "backward"): "1 cut pieces again, 2 their gradients, 0 whole ones",
    ("exchange", "forward"): "0 all tokens of some heads",
    ("exchange", "backward"): "0 all tokens of some heads",
}


@dataclass(frozen=True)
class _Step:
    """What all ranks do next: compute, each for its own time, or move something, together.

    Arguments:
        kind: of `Span`.
        seconds: of each rank's kernels; of a transfer the same for all, from when the last rank has posted it.
    """

    kind: str
    stage: int
    seconds: Sequence[float]


def play(layout: Layout, shape: RecurrenceShape, route: str, machine: Machine | None = None) -> dict[str, Pass]:
    """The forward and the backward pass of one layer by a route, "scan" or "exchange"."""
    machine = layout.mesh.planned_for(machine)
    steps = {"scan": _scan, "exchange": _exchange}[route]
    return {
        name: _played(steps(layout, shape, machine, backward), layout.mesh.sequence_size)
        for name, backward in PASSES.items()
    }


def _played(steps: Sequence[_Step], ranks: int) -> Pass:
    now = [0.0] * ranks
    spans = []
    for step in steps:
        if step.kind == "compute":
            ends = [begin + seconds for begin, seconds in zip(now, step.seconds, strict=True)]
        else:
            ends = [max(now) + seconds for seconds in step.seconds]
        if any(step.seconds):
            found = [Span(rank, step.kind, step.stage, now[rank], ends[rank]) for rank in range(ranks)]
            spans += [span for span in found if span.end > span.begin]
            now = ends
    return Pass(ranks, tuple(spans))


def _scan(layout: Layout, shape: RecurrenceShape, machine: Machine, backward: bool) -> list[_Step]:
    """Forward whole documents, then maps, which all ranks gather, then the cut pieces from their states. Backward the
    cut pieces once more, gradients of their states, which are gathered, their gradients, and those of the whole."""
    ranks = range(layout.mesh.sequence_size)
    plans = [plan_recurrence(layout, rank) for rank in ranks]

    def kernels(stage: int, times: float, cut: bool) -> _Step:
        rows = [sum(piece.size for piece in (plan.cut if cut else plan.whole)) for plan in plans]
        return _Step("compute", stage, [kernel_seconds(shape, times * held, machine) for held in rows])

    size = gathered_bytes(layout, shape)[backward]
    link = machine.link_class(0, layout.mesh.sequence_size - 1)
    seconds = float(transfer_seconds(machine, size, link, "all_to_all")) if plans[0].communicates else 0.0
    states = _Step("states", MAPS, [seconds] * len(ranks))
    if backward:
        return [kernels(MAPS, 1.0, True), states, kernels(CUT, 2.0, True), kernels(WHOLE, 2.0, False)]
    return [kernels(WHOLE, 1.0, False), kernels(MAPS, 1.0 + map_share(shape), True), states, kernels(CUT, 1.0, True)]


def _exchange(layout: Layout, shape: RecurrenceShape, machine: Machine, backward: bool) -> list[_Step]:
    """Rows of all heads become all rows of some heads, three transfers, and the outputs come back by one; gradients
    go the other way."""
    ranks = layout.mesh.sequence_size
    shares = head_shares((shape.key_heads, shape.heads), layout, 0).values
    tokens = sum(layout.docs.lengths)
    rows = [tokens * (last - first) / shape.heads for first, last in shares]
    link = machine.link_class(0, ranks - 1)

    def moved(size: float, transfers: int) -> _Step:
        seconds = transfers * float(transfer_seconds(machine, size / transfers, link, "all_to_all"))
        return _Step("exchange", 0, [seconds if ranks > 1 else 0.0] * ranks)

    there, back = dealt_bytes(layout, shape)
    kernel = [kernel_seconds(shape, (2.0 if backward else 1.0) * held, machine) for held in rows]
    first, last = moved(there, 3), moved(back, 1)
    order = (last, first) if backward else (first, last)
    return [order[0], _Step("compute", WHOLE, kernel), order[1]]
