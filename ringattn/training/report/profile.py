"""Traces of a few steps, asked for by `run.profile`: what each kernel, operator and collective took, for Perfetto.

Outside of the window a step costs two comparisons of integers. The share of exposed communication is taken from the
trace as well: counted in every step, it would need events around every collective.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from ringattn.training.report.beside import beside
from ringattn.training.report.traces import FOLDER, trace_of

MOST_STEPS = 10  # of a window: a step of a large model has some 100,000 events
RANKS = 8  # the first ones write a trace: a machine's worth
LONGEST = 30.0  # seconds that the end of a run waits for its trace, less than looks like a hang


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
        self._writing: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop()
        if kind is None:  # of a run that failed, other ranks are to hear first
            self.close()

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
        """After a step. The last one of the window hands the trace to a process that writes it, which takes seconds."""
        if self._step is None:
            return
        self._step.__exit__(None, None, None)
        self._step = None
        if step >= self._last:
            self._stop()

    def close(self) -> None:
        """Waits until the trace is written, but not longer than `LONGEST`: its process goes on by itself."""
        if self._writing is None:
            return
        try:
            if self._writing.wait(LONGEST):
                self._warn(f"its process ended with exit code {self._writing.returncode}")
        except subprocess.TimeoutExpired:
            self._warn(f"its process still writes after {LONGEST:.0f} s, and goes on")
        self._writing = None

    def _stop(self) -> None:
        if self._recording is None:
            return
        if self._step is not None:  # something was raised in the step
            self._step.__exit__(None, None, None)
        recording, self._recording, self._step, self._last = self._recording, None, None, -1
        recording.stop()
        path = trace_of(self._folder, self._rank)
        events = path.with_name(f".partial-{path.stem}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            recording.export_chrome_trace(str(events))
            steps = json.dumps(self._steps)
            self._writing = beside("ringattn.training.report.traces", events, str(self._rank), steps)
        except (OSError, RuntimeError, ValueError) as error:  # a run does not end for a picture of it
            self._warn(error)

    def _warn(self, error: object) -> None:
        print(f"warning: no trace of rank {self._rank}: {error}", file=sys.stderr, flush=True)
