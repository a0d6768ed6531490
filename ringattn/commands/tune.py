"""Measure which backend, or which tile of FlexAttention, is fastest here.

Every candidate that passes its numeric self-test is timed, forward and backward. The fastest
is kept in RINGATTN_CACHE_DIR, under the device, the software versions and the shape.
"""

import argparse
import json
from typing import Any

from ringattn.commands._call import add_call_arguments, call_spec, check_device, describe, integer, tokens
from ringattn.commands._text import row

DOCUMENTS = 1 << 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_call_arguments(parser)
    parser.add_argument(
        "--length", type=tokens, default=8192, metavar="N", help="tokens of each document, default 8192"
    )
    parser.add_argument(
        "--documents", type=integer(DOCUMENTS), default=1, metavar="N", help="documents in the batch, default 1"
    )
    parser.add_argument(
        "--what",
        choices=("backend", "flex"),
        default="backend",
        help="what is chosen: the kernel backend (default), or the tiles of FlexAttention",
    )
    parser.add_argument("--json", action="store_true", help="print the same as one JSON object")


def run(args: argparse.Namespace) -> int:
    check_device(args)
    report = measure(args)
    print(json.dumps(report, indent=2) if args.json else render(report))
    return 1 if report["error"] else 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every candidate with its time or the reason against it, the best of them, and where that is kept."""
    from ringattn.kernels.tuning.tuned_backend import backend_problem, flex_problem
    from ringattn.kernels.tuning.tuner import Event, Tuner

    spec = call_spec(args)
    make = backend_problem if args.what == "backend" else flex_problem
    problem = make(spec, [args.length] * args.documents)
    events: list[Event] = []
    tuner = Tuner(policy="on", listeners=[events.append])
    best, error = None, None
    try:
        best = tuner.measure(problem)
    except (NotImplementedError, RuntimeError, ValueError) as failed:
        error = str(failed)
    kept = tuner.store is not None and tuner.store.read(str(problem.key)) is not None
    tried = [event for event in events if event.kind in ("timed", "refused")]
    return {
        "call": describe(args, spec.device),
        "key": dict(problem.key.facts),
        "tried": [{"choice": event.choice, "result": event.kind, "detail": event.detail} for event in tried],
        "best": best,
        "stored": str(tuner.store.path) if tuner.store is not None and best is not None and kept else None,
        "error": error,
    }


def render(report: dict[str, Any]) -> str:
    """The report for people."""
    key = report["key"]
    lines = [report["call"], f"measured with {key['tokens']} tokens, longest document {key['longest']}"]
    width = max((len(words(event["choice"])) for event in report["tried"]), default=0)
    for event in report["tried"]:
        lines += row(f"{words(event['choice']):<{width}}  {event['result']:<7}", event["detail"])
    if report["error"]:
        lines.append("No candidate can do this call." if report["tried"] else report["error"])
    else:
        where = f"kept in {report['stored']}" if report["stored"] else "not kept"
        lines.append(f"fastest: {words(report['best'])}; {where}")
    return "\n".join(lines)


def words(choice: dict[str, Any]) -> str:
    """A choice for people."""
    return choice.get("backend") or " ".join(f"{name} {value}" for name, value in choice.items()) or "torch's own"
