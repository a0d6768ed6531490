"""Processes of this machine as their records know them: by number and by when they began. Reads /proc where it is."""

import os
from pathlib import Path

PROC = Path("/proc")
ALIVE, STOPPED, GONE = "alive", "stopped", "gone"


def started(pid: int) -> int:
    """When a process began, in the kernel's ticks; 0 if it is gone or the system does not say."""
    fields = _fields(pid)
    return int(fields[19]) if fields else 0


def state(pid: int, began: int) -> str:
    """ALIVE, STOPPED by a signal, or GONE: ended, waiting to be reaped, or another process has the number now."""
    if not PROC.is_dir():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return GONE
        except OSError:
            pass
        return ALIVE
    fields = _fields(pid)
    if not fields or fields[0] in "ZX" or (began and int(fields[19]) != began):
        return GONE
    return STOPPED if fields[0] in "Tt" else ALIVE


def end(pid: int, began: int, number: int) -> None:
    """Sends a signal to a process, if it is still that one."""
    if state(pid, began) != GONE:
        try:
            os.kill(pid, number)
        except OSError:
            return


def out_of_memory_kills() -> int:
    """How many processes the kernel has ended so far because memory was full, here or in our own group."""
    counts = [0]
    paths = [PROC / "vmstat", *_memory_events()]
    for path in paths:
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        counts += [int(line.split()[1]) for line in lines if line.startswith("oom_kill ")]
    return sum(counts)


def _memory_events() -> list[Path]:
    """Where version 2 of control groups counts for this process's group, and version 1 does."""
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    root = Path("/sys/fs/cgroup")
    found = [root / "memory.events"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found.append(root / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            found.append(root / "memory" / path.lstrip("/") / "memory.oom_control")
    return sorted(set(found))


def _fields(pid: int) -> list[str]:
    """Of /proc/PID/stat, from the state on: what stands before may hold spaces."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()
