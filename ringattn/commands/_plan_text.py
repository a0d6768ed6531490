"""The report of `ringattn plan` for people."""

from typing import Any

from ringattn.commands._text import row, table

SHOWN = 64  # ranks in the table; of more the slowest


def render(report: dict[str, Any]) -> str:
    """The report for people."""
    documents, mesh, machine = report["documents"], report["mesh"], report["machine"]
    heads = "/".join(map(str, report["heads"]))
    lines = [
        f"{documents['count']} documents, {documents['tokens']} tokens (longest {documents['longest']}); "
        f"heads {heads}, head dim {report['head_dim']}",
        f"ring {mesh['ring']} × ulysses {mesh['ulysses']}, {report['policy']} layout; predicted for {machine['name']} "
        f"({machine.get('origin', 'unknown')})",
        "",
    ]
    lines += rank_table(report)
    seconds = report["seconds"]
    together = (
        f"forward {milliseconds(seconds['forward'])} ms, backward {milliseconds(seconds['backward'])} ms; area "
        f"max/mean {report['balance']:.3f}; {report['received_share']:.1%} of an all-gather of the keys is received"
    )
    lines += [
        "",
        "All ranks together, simulated",
        *row("", together, ""),
        "",
        f"Schedule: {report['schedule']['forward']} forward, {report['schedule']['backward']} backward",
    ]
    lines += row("why", report["reason"])
    lines += ["", *alternative_table(report)]
    return "\n".join(lines)


def rank_table(report: dict[str, Any]) -> list[str]:
    ranks = report["ranks"]
    shown = ranks
    if len(ranks) > SHOWN:
        shown = sorted(ranks, key=lambda rank: -rank["forward"]["simulated"] - rank["backward"]["simulated"])[:SHOWN]
    head = ["rank", "tokens", "Mpairs", "recv MiB", "sent MiB", "stages"]
    head += ["compute", "wire", "exposed", "compute", "wire", "exposed"]
    body = []
    for rank in shown:
        times = [rank[name][part] for name in ("forward", "backward") for part in ("compute", "wire", "exposed")]
        sizes = [f"{rank[name] / 2**20:.1f}" for name in ("received_bytes", "sent_bytes")]
        body.append(
            [str(rank["rank"]), str(rank["tokens"]), f"{rank['area'] / 1e6:.1f}", *sizes, str(rank["stages"])]
            + [milliseconds(time) for time in times]
        )
    lines = table([head, *body])
    first = lines[0].index("compute")
    second = lines[0].rindex("compute")
    lines.insert(0, " " * first + "forward ms".ljust(second - first) + "backward ms")
    if len(ranks) > SHOWN:
        lines.append(f"  the {SHOWN} slowest of {len(ranks)} ranks; --json has all")
    return lines


def alternative_table(report: dict[str, Any]) -> list[str]:
    """What else could be done: other schedules on this mesh, other meshes of as many ranks."""
    rows = [["on this mesh", "forward ms", "backward ms", "buffers MiB"]]
    for one in report["alternatives"]:
        marks = [name for name in ("forward", "backward") if report["schedule"][name] == one["schedule"]]
        times = [milliseconds(one[name]) + ("*" if name in marks else " ") for name in ("forward", "backward")]
        rows.append([one["schedule"], *times, f"{one['buffer_bytes'] / 2**20:.0f}"])
    lines = [*table(rows, left=1), "  * chosen"]
    if len(report["meshes"]) > 1:
        rows = [["other meshes, best schedules", "forward ms", "backward ms"]]
        for one in report["meshes"]:
            times = [milliseconds(one[name]) for name in ("forward", "backward")]
            rows.append([f"ring {one['ring']} × ulysses {one['ulysses']}", *times])
        lines += ["", *table(rows, left=1)]
    return lines


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"
