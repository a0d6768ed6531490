"""Traces of steps as files: packed, read, and what is counted in them. Nothing here imports torch."""

import gzip
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = "profile"

Interval = tuple[float, float]


def trace_of(folder: Path, rank: int) -> Path:
    """The file of a rank in a run's `profile/`."""
    return folder / f"trace-rank{rank}.json.gz"


def main() -> None:
    """Of a process: writes trace and summary of a rank. Its arguments are the plain events, which go, the rank, and the
    steps as JSON."""
    events, rank, steps = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    try:
        write_trace(events, rank, steps)
    except (OSError, RuntimeError, ValueError) as error:  # a run does not end for a picture of it
        print(f"warning: no trace of rank {rank}: {error}", file=sys.stderr, flush=True)


def write_trace(events: Path, rank: int, steps: list[int]) -> None:
    """Packs the plain events of a rank's steps, and counts in them; rank 0 tells.

    Raises OSError, and ValueError for events that cannot be read.
    """
    path = trace_of(events.parent, rank)
    partial = path.with_name(f".partial-{path.name}")
    try:
        with open(events, "rb") as plain, gzip.open(partial, "wb", compresslevel=6) as packed:
            shutil.copyfileobj(plain, packed, 1 << 20)
        partial.replace(path)
        facts = {"trace": f"{FOLDER}/{path.name}", "steps": steps, "rank": rank} | summary(read_trace(events))
    finally:
        for left in (events, partial):
            left.unlink(missing_ok=True)
    (events.parent / f"summary-rank{rank}.json").write_text(json.dumps(facts, indent=1) + "\n")
    if rank == 0:
        known = facts["exposed"]
        exposed = "" if known is None else f"; {known:.1%} of these steps is communication under no kernel"
        print(f"profile: {path}, opened by ui.perfetto.dev{exposed}", flush=True)


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a Chrome trace, plain or compressed; times in microseconds."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", errors="replace") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def summary(events: Iterable[dict[str, Any]]) -> dict[str, float | None]:
    """Of a trace: `seconds` of a step; `communication` and `exposed`, shares of the steps.

    Exposed is communication (NCCL's kernels, copies between GPUs) while no other kernel runs on this GPU. Both are None
    where the trace has no GPU: on the CPU operators wait for messages in threads that the profiler does not see.
    """
    steps: set[Interval] = set()
    moving, computing = list[Interval](), list[Interval]()
    for event in events:
        kind, name = event.get("cat"), str(event.get("name", ""))
        if event.get("ph") != "X":
            continue
        span = (float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        if kind == "user_annotation" and name.startswith("step "):
            steps.add(span)
        elif (kind == "kernel" and "nccl" in name.lower()) or (kind == "gpu_memcpy" and "PtoP" in name):
            moving.append(span)
        elif kind == "kernel":
            computing.append(span)
    whole = sum(stop - start for start, stop in steps)
    if not whole:
        return {"seconds": None, "communication": None, "exposed": None}
    seconds = whole / len(steps) / 1e6
    if not moving and not computing:
        return {"seconds": seconds, "communication": None, "exposed": None}
    busy, both = covered(computing), covered([*moving, *computing])
    return {"seconds": seconds, "communication": covered(moving) / whole, "exposed": (both - busy) / whole}


def covered(spans: Iterable[Interval]) -> float:
    """Length of the union of intervals."""
    total, until = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, until))
        until = max(until, stop)
    return total


def read_summaries(output: Path) -> list[dict[str, Any]]:
    """What the ranks of a run wrote beside their traces, by rank; files that cannot be read are passed over."""
    found = []
    for path in (output / FOLDER).glob("summary-rank*.json"):
        try:
            known = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(known, dict):
            found.append(known)
    return sorted(found, key=lambda known: str(known.get("rank")).zfill(6))
