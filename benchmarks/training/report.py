"""Results as a Markdown table and as JSON."""

import json
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.longest import Longest
from benchmarks.training.measuring import Result

COLUMNS = (
    "row", "tokens", "attention", "states", "features", "GPU GiB allocated / reserved", "host GiB locked / resident",
    "planned GPU / host / s",
    "first s", "step s", "update s", "wait s", "tokens/s/GPU", "MFU", "share of the floor",
    "kernel calls a layer f / b",
)  # fmt: skip
PACKAGES = "torch", "transformers", "deepspeed", "flash-attn-4", "torchao"


def facts_of(device: torch.device, ranks: int, kernel: str, model: str) -> dict[str, Any]:
    """How it was measured."""
    return {
        "date": str(date.today()),
        "hardware": f"{ranks} × {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}",
        "versions": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "kernel": kernel,
        "model": model,
        "command": " ".join(["python -m benchmarks.training", *sys.argv[1:]]),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def line_of(result: Result) -> str:
    """One row of the table."""
    begin = [result.row, f"{result.tokens:,}", result.attention, result.states, result.features]
    if result.failure:
        cells = [*begin, result.failure.replace("|", "/"), *[""] * (len(COLUMNS) - len(begin) - 1)]
    else:
        share = _shown(result.share, 3)
        cells = [
            *begin,
            f"{_shown(result.allocated, 2)} / {_shown(result.reserved, 2)}",
            f"{_shown(result.pinned, 2)} / {_shown(result.resident, 2)}",
            " / ".join(_shown(value, 2) for value in result.planned or ()),
            *(_shown(seconds, 3) for seconds in (result.first, result.seconds, result.update, result.waited)),
            _shown(result.per_gpu, 0),
            "" if result.mfu is None else f"{result.mfu:.1%}",
            share,
            " / ".join(f"{count:.2g}" for count in result.calls),
        ]
    return "| " + " | ".join(cells) + " |"


def table_of(results: Sequence[Result]) -> list[str]:
    """Markdown."""
    return ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS), *map(line_of, results)]


def longest_table(found: dict[str, Longest]) -> list[str]:
    """Markdown of searches by row, with every attempt."""
    lines = [
        "| row | longest, tokens | peak GiB there | shortest that failed | why | attempts |",
        "|---|---|---|---|---|---|",
    ]
    for row, one in found.items():
        last = one.fitting[-1] if one.fitting else None
        failed = min((x for x in one.attempts if x.peak is None), key=lambda x: x.tokens, default=None)
        tried = ", ".join(f"{x.tokens:,}: {_shown(x.peak, 2) or 'no'} in {x.seconds:.0f} s" for x in one.attempts)
        best = f"{one.best:,}" + ("" if one.proved else " at least")
        why = "" if failed is None else failed.failure.replace("|", "/")
        high = "" if failed is None else f"{failed.tokens:,}"
        lines.append(f"| {row} | {best} | {_shown(last.peak if last else None, 2)} | {high} | {why} | {tried} |")
    return lines


def markdown(facts: dict[str, Any], results: Sequence[Result], searches: dict[str, Longest]) -> str:
    """The whole report."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    text = [
        f"# Training steps on {facts['hardware']}",
        "",
        f"{facts['date']}; {versions}; {facts['model']}, kernel {facts['kernel']}. `{facts['command']}`",
        "",
        "The most of all ranks. GPU: at most from the first step on, moments included. Step: the mean of those after "
        "the first, the optimizer's update included. Floor: attention's kernel and the matrix products alone; its "
        "share is of the step without the update. Wait: for copies to and from the "
        "host. hf trains a stream of its own on every rank.",
        "",
    ]
    if results:
        text += [*table_of(results), ""]
    if searches:
        text += ["Longest stream by steps with dry attention:", "", *longest_table(searches), ""]
    return "\n".join(text)


def write_json(path: Path, facts: dict[str, Any], results: Sequence[Result], searches: dict[str, Longest]) -> None:
    """Everything, replacing what is there at once."""
    content = {
        "facts": facts,
        "results": [one.as_dict() for one in results],
        "longest": {
            row: {"best": one.best, "proved": one.proved, "attempts": [vars(x) for x in one.attempts]}
            for row, one in searches.items()
        },
    }
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _shown(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
