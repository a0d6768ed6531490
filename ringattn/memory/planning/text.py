"""A choice of settings in words and tables, for people."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ringattn.memory.planning.alive import Alive
from ringattn.memory.planning.items import ITEMS, PHASES
from ringattn.memory.planning.limits import GIB, Limits
from ringattn.memory.planning.settled import Alternative, Settled
from ringattn.memory.planning.step_time import StepTime
from ringattn.parallel.machine.machine import Machine

HOST = "host"


def render(
    settled: Settled, fixed: Collection[str], limits: Limits, machine: Machine, alternatives: Sequence[Alternative]
) -> str:
    """The settings, with chunks of heads where there are several, memory by item at the peak of each phase, the time of
    a step by item, and the alternatives.

    Arguments:
        fixed: which of the settings were asked for.
    """
    plan = settled.alive
    run, model = plan.run, plan.model
    lines = [
        f"{model.name}: {model.total.count / 1e9:.2f} B parameters in {len(model.layers)} layers; {run.tokens:,} "
        f"tokens on ring {run.ring} × ulysses {run.ulysses}" + (f" × data {run.data}" if run.data > 1 else ""),
        f"{run.compute}, {run.engine}, at most {run.local_tokens:,} tokens a rank; attention: {plan.attention.told}; "
        f"predicted for {machine}",
        *([] if plan.recurrent is None else [f"layers that carry a state: {plan.recurrent.told}"]),
        "",
        "Settings (* asked for, the others chosen)",
        *settings(settled.values | ({"head_chunks": run.head_chunks} if run.head_chunks > 1 else {}), fixed),
        "",
        "GiB of a rank at the peak of each phase",
        *memory_table(plan),
        *[f"  {phase}: {moment.name}" for phase, moment in plan.peaks.items()],
        *room(plan, limits),
        "",
        "Seconds of a step",
        *time_table(settled.time),
    ]
    if alternatives:
        lines += ["", "Instead", *others(alternatives)]
    return "\n".join(lines)


def settings(values: Mapping[str, Any], fixed: Collection[str]) -> list[str]:
    """Fields and values, three in a line."""
    cells = [f"{key}={written(value)}{'*' if key in fixed else ''}" for key, value in values.items()]
    width = max(map(len, cells))
    return [
        "  " + "  ".join(cell.ljust(width) for cell in cells[first : first + 3]).rstrip()
        for first in range(0, len(cells), 3)
    ]


def memory_table(plan: Alive) -> list[str]:
    """A row for each item, a column for each phase and one for the host."""
    columns = {**{phase: moment.items for phase, moment in plan.peaks.items()}, HOST: plan.host}
    rows = [["", *PHASES, HOST]]
    for item in ITEMS:
        if any(items.get(item) for items in columns.values()):
            rows.append([item, *(gib(items.get(item, 0)) for items in columns.values())])
    rows.append(["together", *(gib(sum(items.values())) for items in columns.values())])
    return aligned(rows)


def room(plan: Alive, has: Limits) -> list[str]:
    """What the machine has, and what is not of torch's allocator."""
    host = has.host_room(plan.run.ranks)
    told = (
        f"  limits: {has.device_room / GIB:.1f} GiB on the GPU ({has.gpu / GIB:.0f} less {has.margin:.0%} and what is "
    )
    told += "outside of torch's allocator)"
    told += "" if has.host is None else f", {host / GIB:.1f} GiB on the host for a rank"
    messages = [f"  outside: {gib(plan.outside)} GiB of message buffers of copy engines"] if plan.outside else []
    return [told, *messages]


def time_table(time: StepTime) -> list[str]:
    """A row for each item, and what comes of it."""
    rows = [[name, f"{seconds:.3f}", f"{seconds / time.seconds:.1%}"] for name, seconds in time.items.items()]
    rows.append(["together", f"{time.seconds:.3f}", f"{time.tokens_per_second:,.0f} tokens/s/GPU, MFU {time.mfu:.1%}"])
    return aligned(rows, last_left=True)


def others(alternatives: Sequence[Alternative]) -> list[str]:
    """A row for each."""
    rows = [["", "GPU GiB", "host GiB", "seconds", ""]]
    for one in alternatives:
        alive = one.settled.alive
        sizes = gib(alive.peak().total), gib(sum(alive.host.values()))
        rows.append([f"{one.key}={written(one.value)}", *sizes, f"{one.settled.time.seconds:.3f}", one.reason])
    return aligned(rows, last_left=True)


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.2f}"


def written(value: Any) -> str:
    """A value as a configuration has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def aligned(rows: Sequence[Sequence[str]], left: int = 1, last_left: bool = False) -> list[str]:
    """Rows in columns, the first `left` and perhaps the last aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lefts = {*range(left), *([len(widths) - 1] if last_left else [])}
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if number in lefts else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
