"""When each rank computes and waits in a layer that carries a state: all ranks played through, from integers.

As the routes do it (`scan`, `exchange`), and at the rates of `ringattn.recurrent.price`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ringattn.parallel.layout import Layout
from ringattn.parallel.machine.machine import Machine, transfer_seconds
from ringattn.parallel.simulation.spans import PASSES, Pass, Span
from ringattn.recurrent.exchange import head_shares
from ringattn.recurrent.price import (
    RecurrenceShape,
    copy_seconds,
    dealt_bytes,
    kernel_seconds,
    prices,
    round_times,
    scan_work,
)

# Stages of the scan's kernels; the exchange has one.
WHOLE, OPENED, FOLLOWED = range(3)
TOLD = {
    ("scan", "forward"): "1 first pieces and maps, 0 whole documents, 2 later pieces",
    ("scan", "backward"): "2 later pieces, 0 whole documents, 1 first and middle ones",
    ("exchange", "forward"): "0 all tokens of some heads",
    ("exchange", "backward"): "0 all tokens of some heads",
}


@dataclass(frozen=True)
class _Step:
    """What all ranks do next: compute, each for its own time, or move something, together.

    Arguments:
        kind: of `Span`.
        seconds: of each rank's kernels; of a transfer the same for all, from when the last rank has posted it.
        beside: what each rank computes while a transfer is under way, stage and seconds of each rank.
    """

    kind: str
    stage: int
    seconds: Sequence[float]
    beside: Sequence[tuple[int, Sequence[float]]] = ()


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
    spans: list[Span] = []

    def until(kind: str, stage: int, ends: Sequence[float]) -> None:
        spans.extend(Span(rank, kind, stage, now[rank], end) for rank, end in enumerate(ends) if end > now[rank])
        now[:] = [max(one, end) for one, end in zip(now, ends, strict=True)]

    for step in steps:
        if step.kind == "compute":
            until(step.kind, step.stage, [begin + seconds for begin, seconds in zip(now, step.seconds, strict=True)])
            continue
        ends = [max(now) + seconds if any(step.seconds) else 0.0 for seconds in step.seconds]
        for stage, seconds in step.beside:
            until("compute", stage, [begin + one for begin, one in zip(now, seconds, strict=True)])
        until(step.kind, step.stage, ends)
    return Pass(ranks, tuple(spans))


def _scan(layout: Layout, shape: RecurrenceShape, machine: Machine, backward: bool) -> list[_Step]:
    """As the table in `ringattn.recurrent.scan` has it."""
    ranks = layout.mesh.sequence_size
    times = round_times(layout, shape, prices(layout, shape, machine)[0].rounds, machine)
    opening, whole, beside, closing = (
        [kernel_seconds(shape, rows, machine) for rows in part] for part in scan_work(layout, shape, backward)
    )
    first, last = (FOLLOWED, OPENED) if backward else (OPENED, FOLLOWED)
    meanwhile = [(WHOLE, whole), (OPENED, beside)]
    moves = [
        _Step("states", number, [seconds] * ranks, () if number else meanwhile)
        for number, seconds in enumerate(times.transfers)
    ]
    composed = [times.composing + own for own in closing]
    return [_Step("compute", first, opening), *moves, _Step("compute", last, composed)]


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
        seconds += copy_seconds(size, ranks, machine)
        return _Step("exchange", 0, [seconds if ranks > 1 else 0.0] * ranks)

    there, back = dealt_bytes(layout, shape)
    kernel = [kernel_seconds(shape, (2.0 if backward else 1.0) * held, machine) for held in rows]
    first, last = moved(there, 3), moved(back, 1)
    order = (last, first) if backward else (first, last)
    return [order[0], _Step("compute", WHOLE, kernel), order[1]]
