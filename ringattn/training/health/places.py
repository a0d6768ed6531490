"""Where the health of a run is kept: records in this machine's memory, what nodes tell each other in the run's folder.

/dev/shm/ringattn-USER-AGENT-BEGAN-RUN/LOCAL-PID.record     one a rank
OUTPUT/health/node-N.json                                   by the monitor of node N
OUTPUT/health/verdict-ATTEMPT.json                          by the first monitor that ends the run
"""

import hashlib
import json
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from ringattn.training.health import processes

HEALTH = "health"
FRESH = 30.0  # seconds after which a machine that says nothing any more is not there
_FOLDER = re.compile(r"ringattn-\d+-(\d+)-(\d+)-[0-9a-f]{12}")
_CHECKPOINT = re.compile(r"step-(\d{8})")


def memory_root() -> Path:
    """The folder of files in memory, or that of temporary files where there is none."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def memory_folder(agent: int, began: int, output: Path, meeting: str) -> Path:
    """Of the records of this machine's ranks of one start of a run.

    Arguments:
        agent, began: the process that started the ranks.
        meeting: where they meet, another place for every start.
    """
    name = hashlib.sha256(f"{output}\n{meeting}".encode()).hexdigest()[:12]
    return memory_root() / f"ringattn-{os.getuid()}-{agent}-{began}-{name}"


def folders_of(agent: int) -> list[Path]:
    """Folders of records of ranks that a process has started."""
    return sorted(memory_root().glob(f"ringattn-{os.getuid()}-{agent}-*/"))


def sweep() -> None:
    """Removes records of this user's ranks whose starter is gone, and who had no monitor to do it."""
    for folder in memory_root().glob(f"ringattn-{os.getuid()}-*/"):
        match = _FOLDER.fullmatch(folder.name)
        if match is None or processes.state(int(match[1]), int(match[2])) != processes.GONE:
            continue
        with suppress(OSError):  # somebody else is at it
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
    for path in memory_root().glob(f"ringattn-{os.getuid()}-*.refusal"):
        if not processes.started(int(path.stem.rpartition("-")[2])) and processes.PROC.is_dir():
            path.unlink(missing_ok=True)


def refusal_file(agent: int) -> Path:
    """Made by who started an agent and wants to know why its ranks refuse to run, and written by the first of them."""
    return memory_root() / f"ringattn-{os.getuid()}-{agent}.refusal"


def records_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-*.record"))


def node_file(output: Path, node: int) -> Path:
    return output / HEALTH / f"node-{node}.json"


def launcher_file(output: Path, node: int) -> Path:
    """Of a machine that waits for others to start."""
    return output / HEALTH / f"launcher-{node}.json"


def fresh_nodes(output: Path, own: int, count: int) -> list[int]:
    """Machines that wait as this one does, by the clock of the file system that they share."""
    found = []
    for node in range(count):
        try:
            age = launcher_file(output, own).stat().st_mtime - launcher_file(output, node).stat().st_mtime
        except OSError:
            continue
        if age < FRESH:
            found.append(node)
    return found


def verdict_file(output: Path, attempt: int) -> Path:
    return output / HEALTH / f"verdict-{attempt:016x}.json"


def flights(output: Path, rank: int | None = None) -> Path:
    """Where NCCL's flight recorder writes what it knows of a rank; without one the name before that number."""
    return output / "incidents" / f"flight-recorder-{'' if rank is None else rank}"


def flights_pipe(folder: Path, rank: int | None = None) -> Path:
    """A pipe that asks it to, made by torch; without a rank the name before its number."""
    return folder / (f"flights-{rank}.pipe" if rank is not None else "flights-")


def newest_step(output: Path) -> int:
    """Steps in the newest complete checkpoint of a run, 0 without one."""
    found = [0]
    try:
        for path in (output / "checkpoints").iterdir():
            match = _CHECKPOINT.fullmatch(path.name)
            if match and (path / "complete.json").is_file():
                found.append(int(match[1]))
    except OSError:
        pass
    return max(found)


def newest_copy(copies: Path | None, ranks: range) -> int:
    """Steps in the newest copy in memory that each of a machine's ranks has, 0 without one.

    Arguments:
        copies: the run's folder of copies on this machine; None for a run that keeps none.
    """
    if copies is None:
        return 0
    steps = {0}
    for number, rank in enumerate(ranks):
        with suppress(OSError):
            names = [_CHECKPOINT.fullmatch(path.name) for path in (copies / f"rank-{rank:05d}").iterdir()]
            own = {int(match[1]) for match in names if match}
            steps = steps & own if number else own
            continue
        return 0  # a rank without any
    return max(steps, default=0)


def write_json(path: Path, value: Any, first: bool = False) -> bool:
    """Writes a file that is complete or absent.

    Arguments:
        first: leave the file alone if somebody else was first.

    False where it could not be written, or was there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(value) + "\n")
        if not first:
            partial.replace(path)
            return True
        try:
            os.link(partial, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            if path.exists():
                return False
            partial.replace(path)
        return True
    except OSError:
        return False
    finally:
        with suppress(OSError):
            partial.unlink()


def read_json(path: Path) -> dict[str, Any] | None:
    """What a file holds; None if it is not there or is no object."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
