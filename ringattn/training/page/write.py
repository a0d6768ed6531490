"""The page itself: what stands in which section, and the file it is written to."""

import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ringattn.training.page.attention import plan_picture
from ringattn.training.page.charts import Curve, bars, binary, chart, short
from ringattn.training.page.folder import LONGEST_TEXT, RunFolder, is_number
from ringattn.training.report.plot import smoothed
from ringattn.training.secrets import redacted

NAME = "report.html"
MOST_ROWS = 60  # of a table, the newest


def write_page(run: Path, out: Path | None = None) -> Path:
    """Writes the page about the run in folder `run`, by default as `report.html` there. Returns the file.

    Raises ValueError if `run` is not the folder of a run, and OSError, which names the file, where nothing can be
    written; then nothing is left behind.
    """
    text = page_text(RunFolder(run))
    path = run / NAME if out is None else out
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:  # of a full disk Python does not say which file it was
        with suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None
    return path


def write_at_end(run: Path) -> None:
    """The page of a run that has said in `exit.json` how it ended: `run.report=true`. A warning where that fails."""
    try:
        print(f"report: {write_page(run)}", flush=True)
    except Exception as error:  # a run does not fail for a picture
        print(f"warning: {NAME} could not be written: {error}", file=sys.stderr, flush=True)


def page_text(run: RunFolder) -> str:
    """The whole page as HTML, with nothing outside of itself."""
    loader = PackageLoader("ringattn.training.page", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"gib": gib, "short": short, "count": count}
    picture, told, why = plan_picture(run.part("attention"))
    return environment.get_template("page.html.jinja").render(
        run=run,
        title=str(run.record.get("title") or run.path.resolve().name),
        now=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        facts=facts(run),
        charts=curves(run),
        memory=memory(run),
        plan={"picture": picture, "told": told, "why": why},
        data=data(run),
        skipped=[line["step"] for line in run.steps if line.get("skipped") is True],
        stragglers=straggler_rows(run),
        incidents=[incident(one) for one in run.incidents[-MOST_ROWS:]],
        evaluations=[(one, _written(one.numbers)) for one in run.evaluations],
        profiles=profiles(run.path),
        environment=surroundings(run),
    )


def facts(run: RunFolder) -> list[tuple[str, str]]:
    """The numbers at the top: (name, value)."""
    steps, known = run.steps, []
    if steps:
        of = f" of {run.record['steps']:,}" if is_number(run.record.get("steps")) else ""
        known.append(("steps", f"{steps[-1]['step']:,}{of}"))
    losses = run.series("loss")
    if losses:
        known.append(("loss, smoothed", f"{smoothed([loss for _, loss in losses])[-1]:.4f}"))
    for name, points in list(run.validation.items())[:3]:
        known.append((f"loss on {name}", f"{points[-1][1]:.4f}"))
    for key, name, form in (
        ("tokens_per_second", "tokens a second", "{:,.0f}"),
        ("mfu", "MFU", "{:.1%}"),
    ):
        if values := [value for _, value in run.series(key)]:
            known.append((f"{name}, median", form.format(median(values))))
    if values := [value for _, value in run.series("peak_memory_gib")]:
        known.append(("peak memory of rank 0", f"{max(values):.2f} GiB"))
    if values := [value for _, value in run.series("tokens")]:
        known.append(("tokens seen", short(values[-1])))
    if seconds := sum(value for _, value in run.series("seconds")):
        known.append(("time in steps", _duration(seconds)))
    return known


def curves(run: RunFolder) -> list[tuple[str, Markup]]:
    """Pictures over steps: (title, SVG)."""
    skipped = [line["step"] for line in run.steps if line.get("skipped") is True]
    usual = [line for line in run.steps if line.get("warmup") is not True]

    def raw(name: str, points: Sequence[tuple[float, float]], colour: int = 0) -> list[Curve]:
        smooth = list(zip([x for x, _ in points], smoothed([y for _, y in points]), strict=True))
        return [Curve("each step", points, "raw", colour), Curve(name, smooth, "line", colour)]

    loss = raw("smoothed", run.series("loss"))
    held_out = [Curve(name, points, "dots", at) for at, (name, points) in enumerate(run.validation.items(), 1)]
    waited = [(step, 100 * value) for step, value in _shares(usual, "waited")]
    found = [
        ("Loss, nats a target token", chart([*loss, *held_out], "step", short, skipped, "step left out")),
        ("Gradient norm, before clipping", chart(raw("smoothed", run.series("grad_norm"), 3), "step", short)),
        ("Learning rate", chart([Curve("learning rate", run.series("lr"))], "step", short)),
        ("Tokens a second", chart(raw("smoothed", run.series("tokens_per_second"), 2), "step", short)),
        ("MFU", chart(raw("smoothed", run.series("mfu"), 2), "step", lambda value: f"{value:.0%}")),
        ("Seconds a step", chart(raw("smoothed", run.series("seconds", usual), 4), "step", short)),
        ("Waiting for data, % of the step", chart([Curve("waited", waited, "line", 4)], "step", short, from_zero=True)),
        ("Peak memory of rank 0, GiB", chart([Curve("peak", run.series("peak_memory_gib"))], "step", short)),
    ]
    return [(title, Markup(svg)) for title, svg in found if svg]


def _shares(lines: Iterable[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [
        (line["step"], line[key] / line["seconds"])
        for line in lines
        if is_number(line.get(key)) and is_number(line.get("seconds")) and line["seconds"] > 0
    ]


def memory(run: RunFolder) -> dict[str, Any]:
    """The plan by item, largest first, beside what was measured."""
    known = run.part("memory")
    rows = {}
    for part, name in (("items", "device"), ("host", "host")):
        items = known.get(part)
        sizes = {str(key): size for key, size in items.items() if is_number(size)} if isinstance(items, dict) else {}
        rows[name] = sorted(((key, size) for key, size in sizes.items() if size > 0), key=lambda item: -item[1])
    measured = [value * 2**30 for _, value in run.series("peak_memory_gib")]
    total = sum(size for _, size in rows["device"])
    return {
        "rows": rows,
        "total": total,
        "most": max((size for row in rows.values() for _, size in row), default=1),
        "room": known["room"] if is_number(known.get("room")) else None,
        "at": str(known.get("at", "")),
        "note": str(known.get("note", "")),
        "measured": max(measured, default=None),
        "on_gpu": "gpu" in run.part("hardware"),
    }


def data(run: RunFolder) -> dict[str, Any]:
    """Numbers of the corpus, and its lengths as two pictures."""
    known = run.part("data")
    rows = [row for row in known.get("histogram") or [] if isinstance(row, list) and all(map(is_number, row))]
    rows = [row for row in rows if len(row) == 4]

    def drawn(column: int, what: str) -> Markup:
        told = [
            (binary(low), n[column], f"{low:,} to {high:,} tokens: {n[0]:,} documents, {n[1]:,} tokens")
            for low, high, *n in rows
        ]
        return Markup(bars(told, f"{what} by length in tokens, from", short))

    numbers = [
        (key, count(known[key])) for key in ("documents", "tokens", "longest", "median", "empty") if key in known
    ]
    return {"numbers": numbers, "charts": [drawn(0, "documents"), drawn(1, "tokens")] if rows else []}


def straggler_rows(run: RunFolder) -> list[list[str]]:
    """Rank by rank, the newest last."""
    rows = []
    for line in run.stragglers:
        for one in line["behind"]:
            if isinstance(one, dict):
                numbers = [f"{one[key]:.4f}" if is_number(one.get(key)) else "" for key in ("seconds", "median")]
                behind = f"{one['percent']} %" if is_number(one.get("percent")) else ""
                names = [str(value) for value in (line.get("step"), one.get("rank"), one.get("host"), one.get("what"))]
                rows.append([*names, *numbers, behind])
    return rows[-MOST_ROWS:]


def incident(record: dict[str, Any]) -> dict[str, str]:
    """When, what kind, which rank, the message, and the rest as text."""
    rest = {key: value for key, value in record.items() if key not in ("time", "kind", "rank", "message")}
    rank = record.get("rank")
    return {
        "time": str(record.get("time", ""))[:19].replace("T", " "),
        "kind": str(record.get("kind", "")),
        "rank": "" if rank is None else f"rank {rank}",
        "message": str(record.get("message", "")),
        "rest": _written(rest or None),
    }


def profiles(run: Path) -> list[dict[str, str]]:
    """What the windows of the profiler said, one for each rank that wrote a trace."""
    from ringattn.training.report.traces import read_summaries

    return [
        {
            "file": str(one.get("trace")),
            "steps": ", ".join(map(str, one["steps"])) if isinstance(one.get("steps"), list) else "",
            "seconds": f"{one['seconds']:.4f}" if is_number(one.get("seconds")) else "",
            "exposed": f"{one['exposed']:.1%}" if is_number(one.get("exposed")) else "not known without a GPU",
        }
        for one in read_summaries(run)
    ]


def surroundings(run: RunFolder) -> dict[str, list[tuple[str, str]]]:
    """Versions, hardware and how the run was started, as tables."""
    record, hard = run.record, dict(run.part("hardware"))
    for key in ("memory", "gpu_memory"):
        if is_number(hard.get(key)):
            hard[key] = gib(hard[key])
    started: dict[str, Any] = {
        name: record[name] for name in ("command", "parameters", "ranks", "ranks_per_node") if name in record
    }
    starts = [one for one in record.get("starts") or [] if isinstance(one, dict)]
    mesh = run.part("attention")
    if all(key in mesh for key in ("data", "ring", "ulysses")):
        started["mesh"] = f"data {mesh['data']} × ring {mesh['ring']} × ulysses {mesh['ulysses']}"
    for number, one in enumerate(starts[-10:], max(1, len(starts) - 9)):
        started[f"start {number}"] = f"{one.get('time')}, after step {one.get('step')}, {one.get('ranks')} ranks"
    tables: dict[str, dict[str, Any]] = {"Start": started, "Hardware": hard, "Versions": run.part("versions")}
    return {
        name: [(str(key).replace("_", " "), count(value)) for key, value in table.items() if value not in (None, "")]
        for name, table in tables.items()
        if table
    }


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def count(value: Any) -> str:
    """A number with its thousands apart; other values as they are."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _written(value: Any) -> str:
    if value is None:
        return ""
    text = json.dumps(redacted(value), indent=2, ensure_ascii=False)
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + f"\n… ({len(text):,} signs)"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
