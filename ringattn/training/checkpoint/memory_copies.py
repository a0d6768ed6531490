"""Where copies of the newest state are kept between saves: in memory, or on a disk of the machine itself.

They outlive the processes of a run, so that a start on the same machines goes on from them. Every rank has a folder of
its own, `FOLDER/ringattn-UID-NAME-DIGEST/rank-00000/`, with the same files as on disk.
"""

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ringattn.training.checkpoint.folders import Found, found_in, in_units
from ringattn.training.checkpoint.marker import BadCheckpoint, read_marker, write_marker
from ringattn.training.checkpoint.saved_state import SavedState, part_name

RUN = "run.json"
GUESTS = "guests"  # copies that a machine keeps for the one before it; see `neighbours.py`
COPIES = 2  # the newest, and the next one while it is written


def copies_folder(folder: Path, output: Path) -> Path:
    """The folder for all ranks of this machine, named after the run's own."""
    output = output.resolve()
    digest = hashlib.sha256(str(output).encode()).hexdigest()[:12]
    return folder / f"ringattn-{os.getuid()}-{output.name}-{digest}"


def rank_folder(copies: Path, rank: int) -> Path:
    """A rank's own."""
    return copies / f"rank-{rank:05d}"


def make_rank_folder(copies: Path, rank: int) -> Path:
    """Makes it, for this user alone. Raises OSError, also if another user made one of the name."""
    copies.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = copies.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise OSError(None, f"{copies} is not a folder of this user", None)
    own = rank_folder(copies, rank)
    own.mkdir(mode=0o700, exist_ok=True)
    return own


def held_parts(copies: Path, runs: Collection[str]) -> dict[tuple[int, int], dict[int, Found]]:
    """What a machine holds of some runs: by step and number of the ranks that wrote it, the part of each rank. A rank's
    own comes before what is kept for another machine."""
    held: dict[tuple[int, int], dict[int, Found]] = {}
    for root in [*sorted(copies.glob("rank-*")), *sorted((copies / GUESTS).glob("rank-*"))]:
        number = root.name.removeprefix("rank-")
        for one in found_in(root) if number.isdigit() else ():
            if one.marker is not None and one.marker.run in runs:
                held.setdefault((one.step, one.marker.state.world_size), {}).setdefault(int(number), one)
    return held


def remove_copies(copies: Path, rank: int, count: int) -> None:
    """Deletes a rank's copies, and those of ranks that a run does not have; the last rank of a machine takes the folder
    along."""
    remove_other_copies(copies, rank, count, ())
    shutil.rmtree(rank_folder(copies, rank), ignore_errors=True)
    try:
        copies.rmdir()
    except OSError:  # others are not done
        return


def remove_other_copies(copies: Path, rank: int, count: int, kept: Collection[Path]) -> None:
    """Deletes what a run does not go on from: a rank's other copies, and those of ranks that it does not have."""
    for folder in copies.glob("rank-*"):
        number = folder.name.removeprefix("rank-")
        if not number.isdigit() or rank != int(number) < count:
            continue
        with suppress(OSError):  # other ranks of the machine do the same
            for copy in folder.iterdir():
                if copy not in kept:
                    shutil.rmtree(copy, ignore_errors=True)
            if int(number) >= count:
                folder.rmdir()


def adopt(folders: Collection[Path], run: str) -> None:
    """Marks copies that a run goes on from as its own, if they were another's: of the same with other values."""
    for folder in folders:
        with suppress(OSError, BadCheckpoint):  # it is read all the same, and the next copy comes
            marker = read_marker(folder)
            if marker.run != run:
                write_marker(folder, replace(marker, run=run))


def saved_copies(copies: Path, step: int, rank: int, count: int) -> SavedState:
    """The copy of a step, for a rank: of the parts of `count` ranks those that the machine holds."""
    parts: dict[int, Path] = {}
    for one in range(count):
        for home in (copies, copies / GUESTS):
            path = rank_folder(home, one) / f"step-{step:08d}" / part_name(one)
            if one not in parts and path.is_file():
                parts[one] = path
    return SavedState(parts, rank)


def run_of(checkpoints: Path) -> str:
    """What tells a run from another one in the same folder: a random text that its checkpoints' folder keeps.

    Written by one rank. Copies of an earlier run, whose folder was deleted since, have another. Raises OSError.
    """
    path = checkpoints / RUN
    if found := known_run(checkpoints):
        return found
    made = secrets.token_hex(8)
    checkpoints.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{RUN}.partial")
    partial.write_text(json.dumps({"run": made}))
    partial.replace(path)
    return made


def known_run(checkpoints: Path) -> str:
    """What `run_of` wrote before; "" where it did not. Raises OSError for a file that cannot be read."""
    try:
        found = json.loads((checkpoints / RUN).read_text())["run"]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return ""
    return found if isinstance(found, str) else ""


def is_memory(folder: Path) -> bool:
    """Whether a folder, or the one it will be made in, is in memory (a tmpfs), as /dev/shm is."""
    folder = folder.resolve()
    best, kind = -1, ""
    try:
        mounts = Path("/proc/mounts").read_text()
    except OSError:
        return False
    for line in mounts.splitlines():
        _, place, this = line.split(" ", 3)[:3]
        place = place.replace("\\040", " ")
        if (folder == Path(place) or Path(place) in folder.parents) and len(place) >= best:
            best, kind = len(place), this
    return kind in ("tmpfs", "ramfs")


def copies_of(neighbours: bool) -> int:
    """How many copies of the states of so many ranks a machine holds: of its own, and with neighbours of others."""
    return 2 * COPIES if neighbours else COPIES


def lacking_room(folder: Path, copies: Path, size: int, neighbours: bool = False) -> str:
    """What a folder lacks for the copies of a machine, in words; "" if they fit.

    Arguments:
        copies: the run's own folder in it, whose files will be replaced.
        size: bytes of the state of all ranks of the machine.
        neighbours: whether as much is kept for another machine.
    """
    if not folder.is_dir():
        return f"{folder} is not a folder of this machine"
    held = sum(path.stat().st_size for path in copies.rglob("*") if path.is_file()) if copies.is_dir() else 0
    free, needed = shutil.disk_usage(folder).free + held, copies_of(neighbours) * size
    if free >= needed:
        return ""
    of_others = ", and as many of another machine" if neighbours else ""
    return (
        f"{in_units(needed)} are needed in {folder} on each machine ({COPIES} copies of {in_units(size)}: one stays "
        f"while the next is written{of_others}) and {in_units(free)} are free"
    )
