"""Traces of a few steps, asked for by `run.profile`: what each kernel, operator and collective took, for Perfetto.

Outside of the window a step costs two comparisons of integers. The share of exposed communication is taken from the
trace as well: counted in every step, it would need events around every collective.
"""

import gzip
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

FOLDER = "profile"
MOST_STEPS = 10  # of a window: a step of a large model has some 100,000 events
RANKS = 8  # the first ones write a trace: a machine's worth

Interval = tuple[float, float]


def check_window(value: Any) -> None:
    """Raises ValueError unless `run.profile` is null or the first and the last step of a window."""
    if value is None:
        return
    good = isinstance(value, list) and len(value) == 2
    good = good and all(isinstance(step, int) and not isinstance(step, bool) for step in value)
    if not good or not 1 <= value[0] <= value[1] < value[0] + MOST_STEPS:
        raise ValueError(
            "run.profile must be null or the first and the last step of a trace, as in 'run.profile=[100,103]', "
            f"counted from 1 and at most {MOST_STEPS} steps, got {value!r}"
        )


class Profile:
    """Records the steps of a window and writes its trace. Use it as a context manager, and `step` around each step.

    Arguments:
        output: the run's folder; `profile/` in it holds the traces.
        window: first and last step; None: nothing is ever recorded.
        rank: of this process; only the first `RANKS` record.
    """

    def __init__(self, output: Path, window: Sequence[int] | None, rank: int) -> None:
        self._folder, self._rank = output / FOLDER, rank
        self._first, self._last = window if window is not None and rank < RANKS else (0, -1)
        self._recording: Any = None
        self._step: Any = None
        self._steps: list[int] = []

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Before a step, the wait for its batch included; counted from 1."""
        if not self._first <= step <= self._last:
            return
        if self._recording is None:
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._recording = torch.profiler.profile(activities=activities)
            self._recording.start()
        self._step = record_function(f"step {step}")
        self._step.__enter__()
        self._steps.append(step)

    def after(self, step: int) -> None:
        """After a step. The last one of the window writes the trace, which takes seconds."""
        if self._step is None:
            return
        self._step.__exit__(None, None, None)
        self._step = None
        if step >= self._last:
            self._stop()

    def _stop(self) -> None:
        if self._recording is None:
            return
        if self._step is not None:  # something was raised in the step
            self._step.__exit__(None, None, None)
        recording, self._recording, self._step, self._last = self._recording, None, None, -1
        recording.stop()
        path = self._folder / f"trace-rank{self._rank}.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".partial-{path.name}")
            recording.export_chrome_trace(str(partial))
            partial.replace(path)
            events = read_trace(path)
            facts = {"trace": f"{FOLDER}/{path.name}", "steps": self._steps, "rank": self._rank} | summary(events)
            (self._folder / f"summary-rank{self._rank}.json").write_text(json.dumps(facts, indent=1) + "\n")
        except (OSError, RuntimeError, ValueError) as error:  # a run does not end for a picture of it
            print(f"warning: no trace of rank {self._rank}: {error}", file=sys.stderr, flush=True)
            return
        if self._rank == 0:
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
