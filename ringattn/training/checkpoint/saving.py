"""Saves of a run: now or in a thread, to a disk and to memory, and what is done about those that fail."""

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from ringattn.training.checkpoint.host_copy import HostCopy
from ringattn.training.checkpoint.marker import TrainState
from ringattn.training.checkpoint.neighbours import share_with_neighbour
from ringattn.training.checkpoint.snapshot import Snapshot, snapshot_of
from ringattn.training.checkpoint.together import SaveFailed, Together
from ringattn.training.checkpoint.writing import Place, write_checkpoint
from ringattn.training.health.incidents import record_incident

T = TypeVar("T")


class Saves:
    """What a run saves, and where. All calls are collective, in the same order on every rank.

    Arguments:
        output: the run's folder, for incidents.
        asynchronous: a save copies its tensors to host memory, on a GPU beside what comes next, and returns; a thread
            writes them, and the next save waits for it. Ranks may differ in it.
        limit: so many saves in a row that failed stop the run.
        device: where the tensors are.
    """

    def __init__(self, output: Path, asynchronous: bool, limit: int, device: torch.device) -> None:
        self.together = Together()
        self.stalled = 0.0
        """Seconds that the last call of `save` kept the training waiting: the host, not a GPU that `hold` lets wait."""
        self._output, self._limit = output, limit
        self._copy = HostCopy(device) if asynchronous else None
        self._thread: threading.Thread | None = None
        self._broken: BaseException | None = None
        self._failed: dict[str, list[str]] = {}  # reasons of the last saves in a row that failed, by kind

    def save(self, state: TrainState, tree: Mapping[str, Any], places: Sequence[Place]) -> None:
        """Saves a state in some places, one after the other.

        Arguments:
            tree: tensors and plain values, nested. They may change as soon as this returns, on a GPU after `hold`.

        A save that fails costs a warning and an incident. Raises SaveFailed if it was the last that may fail; where a
        thread writes, the next call does so.
        """
        began = time.perf_counter()
        self.wait()
        snapshot = snapshot_of(tree)
        copied = self._with_memory(lambda copy: copy.of(snapshot))
        given = (state, copied or snapshot, places)
        if copied is not None:
            self._thread = threading.Thread(target=self._write, args=given, name="saving", daemon=True)
            self._thread.start()
        else:
            self._write(*given)
            self.wait()
        self.stalled = time.perf_counter() - began

    def hold(self) -> None:
        """Before anything changes that is on a GPU and was saved: the GPU waits until it is copied, the host does not.
        Not collective."""
        if self._copy is not None:
            self._copy.hold()

    def take_memory(self, tree: Mapping[str, Any]) -> None:
        """Takes the host memory of the first copy ahead of it. Not collective."""
        if self._copy is not None:
            self._with_memory(lambda copy: copy.take_memory(snapshot_of(tree)))

    def wait(self) -> None:
        """Until what was saved is written, so that all of it may change. Raises SaveFailed if too many saves failed in
        a row."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._broken is not None:
            raise self._broken
        for kind, reasons in self._failed.items():
            if len(reasons) >= self._limit:
                raise SaveFailed(
                    f"{len(reasons)} saves of a {kind} failed in a row, as many as run.max_failed_saves allows; the "
                    f"last one: {reasons[-1]}"
                )

    def finish(self, kind: str = "checkpoint") -> None:
        """Waits, and raises SaveFailed if the last save of a kind failed: nothing comes after it to make it good."""
        self.wait()
        if self._failed.get(kind):
            raise SaveFailed(f"the last {kind} was not saved: {self._failed[kind][-1]}")

    def close(self) -> None:
        """Gives host memory back. Nothing may be saved after it."""
        if self._copy is not None:
            self._copy.close()
        self.together.close()

    def _with_memory(self, use: Callable[[HostCopy], T]) -> T | None:
        """What is done with host memory for a copy; None where there is none, or was not asked for."""
        if self._copy is None:
            return None
        try:
            return use(self._copy)
        except MemoryError as error:
            self._warn(f"{error}; from now on the training waits while this rank writes")
            self._copy = None
            return None

    def _write(self, state: TrainState, snapshot: Snapshot, places: Sequence[Place]) -> None:
        try:
            for place in places:
                try:
                    self.together(self._copied)
                    write_checkpoint(place, state, snapshot, self.together)
                    if place.neighbour:
                        share_with_neighbour(place, state.step, self.together)
                    self._failed.pop(place.kind, None)
                except SaveFailed as error:
                    self._note(place, state.step, str(error))
        except BaseException as error:  # of a lost rank, or a mistake of ours: for the thread that waits
            self._broken = error

    def _copied(self) -> None:
        if self._copy is not None:
            self._copy.wait()

    def _note(self, place: Place, step: int, reason: str) -> None:
        reasons = self._failed.setdefault(place.kind, [])
        reasons.append(reason)
        if self.together.rank != 0:
            return
        message = f"the {place.kind} of step {step} could not be saved: {reason}"
        record_incident(self._output, "failed-save", message, step=step, place=place.kind, in_a_row=len(reasons))
        self._warn(f"{message} (failure {len(reasons)} of {self._limit} in a row)")

    def _warn(self, message: str) -> None:
        print(f"warning: {message}", file=sys.stderr, flush=True)
