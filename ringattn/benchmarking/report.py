"""Results as a Markdown table, JSON and a plot."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ringattn.benchmarking.captured import SUFFIX
from ringattn.benchmarking.suite import CAPTURED_CEILING, CEILING, Result
from ringattn.benchmarking.workloads import sequences_of

COLUMNS = (
    "workload", "contestant", "f ms", "f+b ms", "f TFLOP/s", "f+b TFLOP/s", "f share", "f+b share", "exposed ms",
    "plan ms", "slowed", "memory", "error out, dq, dk, dv", "schedule",
)  # fmt: skip


def line(result: Result) -> str:
    """One row of the table."""
    if result.failure:
        return f"| {result.workload} | {result.contestant} | {result.failure} |" + " |" * (len(COLUMNS) - 3)
    cells = [
        result.workload,
        result.contestant,
        _shown(result.forward, 3),
        _shown(result.both, 3),
        _shown(result.rate_forward, 0),
        _shown(result.rate_both, 0),
        _shown(result.share_forward, 3),
        _shown(result.share_both, 3),
        _shown(result.exposed, 3),
        _shown(result.planning, 1),
        _shown(result.slowed, 3),
        _shown(result.memory, 2),
        ", ".join(f"{error:.1e}" for error in result.errors.values()),
        result.choice,
    ]
    return "| " + " | ".join(cells) + " |"


def header() -> list[str]:
    return ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]


def markdown(results: Sequence[Result], facts: dict[str, Any]) -> str:
    """The whole report: how it was measured, the table, and the sum over workloads of every contestant."""
    ranks, device = facts["ranks"], facts["device"]
    text = [
        f"# Attention on {ranks} × {device}",
        "",
        f"{facts['date']}; {facts['versions']}; {facts['dtype']}, {facts['heads']} heads of {facts['head_dim']}, "
        f"kernel {facts['kernel']}, seed {facts['seed']}. `{facts['command']}`",
        "",
        "Slowest rank, median. TFLOP/s per GPU by mask area, backward 2.5 × forward. Share: of the kernel alone on an "
        "even share of the heads, in the same run. Exposed: what is gone without transfers. Memory: peak of both "
        "passes over inputs, output and gradients. Error: relative to the kernel alone, compared before "
        "it was timed." + _slowed(facts) + _captured(results),
        "",
        *header(),
        *map(line, results),
        "",
        *totals(results),
        *sharing(results),
    ]
    return "\n".join(text) + "\n"


def _slowed(facts: dict[str, Any]) -> str:
    share, ranks = facts.get("slow"), facts.get("slow_ranks")
    if not share:
        return ""
    return f" Slowed: f+b with ranks {ranks} taking {share:.0%} longer on purpose, over f+b without."


def _captured(results: Sequence[Result]) -> str:
    if not any(result.captured for result in results):
        return ""
    return (
        f" {SUFFIX}: replays of captured CUDA graphs, whose results were compared. Their share is of the kernel alone "
        "captured as well, exposed is measured with a capture without transfers, and memory counts what the graph of "
        "both passes holds."
    )


def totals(results: Sequence[Result]) -> list[str]:
    """The sums over all workloads, of contestants that did them all."""
    names = list(dict.fromkeys(result.contestant for result in results))
    workloads = {result.workload for result in results}
    rows = []
    for name in names:
        done = [r for r in results if r.contestant == name and r.both is not None and r.forward is not None]
        if len(done) == len(workloads):
            forward, both = sum(r.forward or 0.0 for r in done), sum(r.both or 0.0 for r in done)
            rows.append(f"| {name} | {forward:.2f} | {both:.2f} |")
    return ["| sum over workloads | f ms | f+b ms |", "|---|---|---|", *rows]


def sharing(results: Sequence[Result]) -> list[str]:
    """How many times as fast trees are as their sequences apart, of contestants that did both."""
    both = {(result.workload.lower(), result.contestant): result.both for result in results if result.both}
    rows = []
    for (name, contestant), tree in both.items():
        apart = both.get((sequences_of(name), contestant))
        if apart:
            rows.append(f"| {contestant} | {name} | {sequences_of(name)} | {apart / tree:.2f} |")
    return (
        ["", "| shared prefix | tree | its sequences apart | times as fast, f+b |", "|---|---|---|---|", *rows]
        if rows
        else []
    )


def write(folder: Path, results: Sequence[Result], facts: dict[str, Any]) -> list[Path]:
    """benchmark.md and benchmark.json in `folder`; what is there is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "benchmark.md", folder / "benchmark.json"]
    content = {"facts": facts, "results": [result.as_dict() for result in results]}
    for path, text in zip(paths, (markdown(results, facts), json.dumps(content, indent=1) + "\n"), strict=True):
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    return paths


def plot(path: Path, results: Sequence[Result], facts: dict[str, Any]) -> Path:
    """Bars: the share of the kernel alone, forward and backward, of every contestant on every workload. Of captured
    contestants it is the share of the kernel captured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ceilings = CEILING, CAPTURED_CEILING
    done = [result for result in results if result.share_both is not None and result.contestant not in ceilings]
    workloads = list(dict.fromkeys(result.workload for result in done))
    names = list(dict.fromkeys(result.contestant for result in done))
    figure, axes = pyplot.subplots(figsize=(2.5 + 1.7 * len(workloads), 4.5), layout="constrained")
    width, colors = 0.85 / max(1, len(names)), pyplot.get_cmap("tab20")
    for number, name in enumerate(names):
        bars = [(workloads.index(r.workload), r.share_both) for r in done if r.contestant == name]
        places = [place + (number - (len(names) - 1) / 2) * width for place, _ in bars]
        axes.bar(places, [share or 0.0 for _, share in bars], width * 0.92, label=name, color=colors(number % 20))
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(workloads)), workloads)
    axes.set_ylabel("share of the kernel alone, forward + backward")
    axes.set_ylim(0.0, max([1.05, *(1.03 * (result.share_both or 0.0) for result in done)]))
    axes.set_title(f"{facts['ranks']} × {facts['device']}, {facts['heads']} heads of {facts['head_dim']}")
    figure.legend(ncols=min(5, max(1, len(names))), loc="outside lower center", fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _shown(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
