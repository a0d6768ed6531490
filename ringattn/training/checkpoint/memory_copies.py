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
from pathlib import Path

from ringattn.training.checkpoint.folders import in_units
from ringattn.training.checkpoint.saved_state import SavedState, part_name

RUN = "run.json"
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


def remove_copies(copies: Path, rank: int) -> None:
    """Deletes a rank's copies; the last rank of a machine takes the folder along."""
    shutil.rmtree(rank_folder(copies, rank), ignore_errors=True)
    try:
        copies.rmdir()
    except OSError:  # others are not done
        return


def remove_other_copies(copies: Path, rank: int, count: int, kept: Path | None) -> None:
    """Deletes what a run does not go on from: a rank's other copies, and folders of ranks that it does not have."""
    own = rank_folder(copies, rank)
    for folder in [*own.iterdir()]:
        if folder != kept:
            shutil.rmtree(folder, ignore_errors=True)
    for folder in copies.glob("rank-*"):
        if folder.name.removeprefix("rank-").isdigit() and int(folder.name.removeprefix("rank-")) >= count:
            shutil.rmtree(folder, ignore_errors=True)


def saved_copies(copies: Path, step: int, rank: int, count: int) -> SavedState:
    """The copy of a step: the rank's own part, and those of the ranks of the same machine."""
    parts = {one: rank_folder(copies, one) / f"step-{step:08d}" / part_name(one) for one in range(count)}
    return SavedState({one: path for one, path in parts.items() if path.is_file()}, rank)


def run_of(checkpoints: Path) -> str:
    """What tells a run from another one in the same folder: a random text that its checkpoints' folder keeps.

    Written by one rank. Copies of an earlier run, whose folder was deleted since, have another. Raises OSError.
    """
    path = checkpoints / RUN
    try:
        found = json.loads(path.read_text())["run"]
        if isinstance(found, str) and found:
            return found
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        pass
    made = secrets.token_hex(8)
    checkpoints.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{RUN}.partial")
    partial.write_text(json.dumps({"run": made}))
    partial.replace(path)
    return made


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
