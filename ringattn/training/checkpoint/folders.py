"""The folders of checkpoints: which are there, which are whole, and how one is put in the place of an older one.

`step-00000010` is a checkpoint, `step-00000010.partial` one that is being written, or was when its process died, and
`step-00000010.bad` one that was found damaged: nobody reads it again, and nobody deletes it.
"""

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ringattn.training.checkpoint.marker import MARKER, BadCheckpoint, Marker, OldCheckpoint, TrainState, read_marker

PARTIAL, BAD = ".partial", ".bad"
GIB = 2**30
_NAME = re.compile(r"step-(\d{8,})")
_ASIDE = 1 << 20  # bytes beside the tensors: markers and folders


@dataclass(frozen=True)
class Found:
    """A folder that is named like a checkpoint.

    Arguments:
        step: in its name.
        marker: what completes it; None if it is bad.
        reason: why it is bad, with folder and file.
        old: whether an earlier version wrote it, in pickles.
    """

    folder: Path
    step: int
    marker: Marker | None
    reason: str = ""
    old: bool = False


def found_in(root: Path) -> Iterator[Found]:
    """All checkpoints, newest first, each judged by its marker and by the sizes of its files when it is its turn."""
    for step, path in _folders(root):
        yield _judged(step, path)


def _folders(root: Path) -> list[tuple[int, Path]]:
    """All that are named like checkpoints, newest first."""
    if not root.is_dir():
        return []
    folders = [(int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(folders, reverse=True)


def _judged(step: int, folder: Path) -> Found:
    try:
        marker = read_marker(folder)
        if marker.state.step != step:
            raise BadCheckpoint(f"{folder} has the marker of step {marker.state.step}")
        return Found(folder, step, marker)
    except BadCheckpoint as error:
        return Found(folder, step, None, str(error), isinstance(error, OldCheckpoint))


def complete_checkpoints(root: Path) -> list[Path]:
    """Folders of checkpoints that are whole, oldest first."""
    return [found.folder for found in found_in(root) if found.marker is not None][::-1]


def newest_checkpoint(root: Path) -> tuple[Path, TrainState] | None:
    """The newest checkpoint that is whole by its marker and sizes, and its state; None where there was never one.

    Raises BadCheckpoint if there are checkpoints and none of them is whole, and OldCheckpoint if the newest that could
    be whole is of a version that wrote pickles: to begin anew is for people to decide.
    """
    reasons = []
    for found in found_in(root):
        if found.marker is not None:
            return found.folder, found.marker.state
        if found.old:
            raise OldCheckpoint(found.reason)
        reasons.append(found.reason)
    if reasons:
        raise none_good(root, reasons)
    return None


def none_good(root: Path, reasons: list[str]) -> BadCheckpoint:
    """What is said where every checkpoint is bad."""
    return BadCheckpoint(
        f"no checkpoint in {root} can be used: {'; '.join(reasons)}. Choose another run.output, or remove that folder "
        "to begin anew"
    )


def set_aside(folder: Path) -> Path | None:
    """Renames a bad checkpoint, so that no start looks at it again; None where that is impossible."""
    for number in range(1, 1000):
        aside = folder.with_name(folder.name + BAD + ("" if number == 1 else f"-{number}"))
        if not aside.exists():
            try:
                return folder.rename(aside)
            except OSError:
                return None
    return None


def remove_partial(root: Path) -> None:
    """Deletes what processes that died were writing, or deleting."""
    for left in root.glob(f"step-*{PARTIAL}"):
        shutil.rmtree(left, ignore_errors=True)


def is_whole(folder: Path) -> bool:
    """Whether a folder holds a checkpoint that is whole by its marker and sizes."""
    try:
        read_marker(folder)
    except BadCheckpoint:
        return False
    return True


def begin(folder: Path, size: int) -> None:
    """Makes the empty `.partial` folder of a checkpoint, after what earlier ones left is gone.

    Arguments:
        folder: of the checkpoint.
        size: bytes that will be written.

    Raises OSError, also if the disk has less than that free.
    """
    root, needed = folder.parent, size + _ASIDE
    remove_partial(root)
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise OSError(None, f"{folder.name} needs {in_units(needed)} and {in_units(free)} are free in {root}", None)
    partial_of(folder).mkdir()


def in_units(size: int) -> str:
    """Bytes for people."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def partial_of(folder: Path) -> Path:
    """Where a checkpoint stands while it is written."""
    return folder.with_name(folder.name + PARTIAL)


def complete(folder: Path, written: Marker) -> None:
    """Gives the `.partial` folder its name, if all its files are there. What has the name already was no checkpoint.

    Raises OSError, and BadCheckpoint for files that do not have the sizes that were written.
    """
    partial = partial_of(folder)
    read = read_marker(partial)
    if read != written:
        raise BadCheckpoint(f"{partial / MARKER} does not hold what was written")
    _reach_disk(partial)
    if folder.exists() and set_aside(folder) is None:
        raise OSError(None, f"{folder} is in the way and cannot be renamed", None)
    partial.rename(folder)
    _reach_disk(folder.parent)


Spared = Callable[[Sequence[int]], Collection[int]]
"""Of the steps of checkpoints, those that stay although newer ones are there."""


def discard_older(root: Path, keep: int, newest: int, spared: Spared | None = None) -> None:
    """Deletes all but so many of the newest checkpoints that are whole, and those that are spared; those later than
    `newest` do not count.

    A checkpoint is renamed before it is deleted, so that half of one is never taken for a whole one.
    """
    if sum(step <= newest for step, _ in _folders(root)) <= keep:
        return  # without a look into each: who keeps all would wait longer with every one
    whole = [found for found in found_in(root) if found.marker is not None and found.step <= newest]
    stay = spared([found.step for found in whole]) if spared is not None else ()
    for found in (one for one in whole[keep:] if one.step not in stay):
        doomed = partial_of(found.folder)
        found.folder.rename(doomed)
        shutil.rmtree(doomed)


def _reach_disk(folder: Path) -> None:
    """Names in a folder survive a loss of power only after this."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
