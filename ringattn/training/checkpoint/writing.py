"""Writes one checkpoint: aside, marked when every rank is done, then renamed. It is complete or absent, always."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from ringattn.training.checkpoint.folders import Spared, begin, complete, discard_older, is_whole, partial_of
from ringattn.training.checkpoint.marker import FileSum, Marker, TrainState, write_marker
from ringattn.training.checkpoint.saved_state import part_name, write_part
from ringattn.training.checkpoint.snapshot import Snapshot
from ringattn.training.checkpoint.together import SaveFailed, Together


@dataclass(frozen=True)
class Place:
    """Where checkpoints are kept.

    Arguments:
        root: holds their folders.
        keep: so many of the newest stay.
        spared: of the others, these stay too; None for none.
        shared: all ranks write into one folder, which rank 0 completes; otherwise `root` is this rank's alone, and each
            completes a folder of its own.
        kind: what one of them is called.
        run: the run that they are of, where that matters, and its curve.
        before: another one whose copies are looked at too: with the curve of the start before.
        neighbour: the rank of this number on the next machine keeps them too, so many ranks further; 0 for nobody.
    """

    root: Path
    keep: int
    shared: bool = True
    kind: str = "checkpoint"
    run: str = ""
    before: str = ""
    spared: Spared | None = None
    neighbour: int = 0

    @property
    def runs(self) -> tuple[str, ...]:
        """Of whom copies are looked at."""
        return (self.run, self.before) if self.before else (self.run,)

    def folder(self, step: int) -> Path:
        """Of a step's checkpoint."""
        return self.root / f"step-{step:08d}"


def write_checkpoint(place: Place, state: TrainState, snapshot: Snapshot, together: Together) -> Path:
    """Saves as `step-00000010` of a place. Collective.

    Older ones are deleted only when the new one has its name, on every rank, and all its files their sizes. A process
    killed at any point leaves those before it untouched, and at most a `.partial` folder that the next save removes. A
    step that was saved before is not saved again.

    Raises SaveFailed on every rank if it failed on any; then the `.partial` folder is gone.
    """
    folder = place.folder(state.step)
    owner = together.rank == 0 or not place.shared
    there = together(lambda: owner and is_whole(folder))
    if there[0] if place.shared else all(there):
        return folder
    sizes = together(lambda: snapshot.file_size)
    try:
        size = sum(sizes) if place.shared else snapshot.file_size
        together(lambda: begin(folder, size) if owner else None)
        sums = together(lambda: write_part(partial_of(folder), together.rank, snapshot))
        together(lambda: _complete(place, state, sums, together.rank) if owner else None)
    except SaveFailed:
        if owner:
            shutil.rmtree(partial_of(folder), ignore_errors=True)
        raise
    if owner:
        try:
            discard_older(place.root, place.keep, state.step, place.spared)
        except OSError as error:  # the new one is there all the same
            print(f"warning: an older {place.kind} could not be deleted: {error}", file=sys.stderr, flush=True)
    return folder


def _complete(place: Place, state: TrainState, sums: list[FileSum], rank: int) -> None:
    files = {part_name(one): found for one, found in enumerate(sums) if place.shared or one == rank}
    folder, marker = place.folder(state.step), Marker(state, files, place.run)
    write_marker(partial_of(folder), marker)
    complete(folder, marker)
