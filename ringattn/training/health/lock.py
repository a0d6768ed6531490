"""One run at a time in an output folder: a lock of the file system, which ends with the processes that hold it."""

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

LOCK = ".lock"
PATIENCE = 10.0  # seconds: ranks that were told to end, or whose launcher is gone, need some


class Lock:
    """The lock of a run's folder, held by its rank 0, and by the monitor beside it until the ranks are gone."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def release(self) -> None:
        """Gives up this process's share: the lock is free when the last process that inherited it has ended."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1


def take(output: Path, patience: float = PATIENCE) -> tuple[Lock, str]:
    """Takes the lock of a folder, which is made, and a note for the user, "" if there is nothing to say.

    Where the file system has no locks the run goes on without one, and the note says so.

    Raises ValueError that names who holds it if they do not give it up in `patience` seconds.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = output / LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(descriptor)
                raise ValueError(
                    f"run.output={output} is in use by another run: {holder(path)}; wait for it or end it, or choose "
                    "another run.output"
                ) from None
            time.sleep(0.2)
        except OSError as error:
            os.close(descriptor)
            return Lock(-1), f"{path}: {error.strerror}: two runs in this folder at once would not be noticed"
    said = {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
    with suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(said).encode(), 0)
    return Lock(descriptor), ""


def holder(path: Path) -> str:
    """Who wrote into a lock's file, for people."""
    try:
        said = json.loads(path.read_text())
        return f"process {said['pid']} on {said['host']}, since {said['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it did not say who it is"


def is_free(output: Path) -> bool:
    """Whether nobody holds the lock of a folder now."""
    try:
        descriptor = os.open(output / LOCK, os.O_RDWR)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return True
