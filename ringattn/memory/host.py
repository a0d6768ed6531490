"""How much memory the host has to give."""

import resource
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30


@dataclass(frozen=True)
class HostMemory:
    """In bytes, as the kernel says it; None where it does not.

    Arguments:
        total, available: of the machine, or of the container if that has less. What is available can be taken without
            anything being swapped or killed.
        lockable: how much a process may lock (`ulimit -l`); None: as much as there is.
    """

    total: int | None
    available: int | None
    lockable: int | None

    def __str__(self) -> str:
        available, total = (self._gib(one, "unknown") for one in (self.available, self.total))
        return (
            f"{available} of {total} host memory are available; at most {self._gib(self.lockable, 'all of it')} may be "
            "locked (ulimit -l)"
        )

    @staticmethod
    def _gib(amount: int | None, otherwise: str) -> str:
        if amount is None:
            return otherwise
        return f"{amount / GIB:.1f} GiB" if amount >= GIB else f"{amount / 2**20:.0f} MiB"


def host_memory(root: Path = Path("/")) -> HostMemory:
    """Of this machine, at this moment.

    Arguments:
        root: where `proc` and `sys` are.
    """
    said = dict(line.split(":", 1) for line in _read(root / "proc/meminfo").splitlines() if ":" in line)
    kib = {name: int(said[name].split()[0]) for name in ("MemTotal", "MemAvailable") if name in said}
    total, available = (kib[name] * 1024 if name in kib else None for name in ("MemTotal", "MemAvailable"))
    cgroup = root / "sys/fs/cgroup"
    limit, used = (_read(cgroup / name).strip() for name in ("memory.max", "memory.current"))
    if limit.isdigit() and used.isdigit():
        total = min(int(limit), total if total is not None else int(limit))
        left = max(int(limit) - int(used), 0)
        available = min(left, available if available is not None else left)
    lockable = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return HostMemory(total, available, None if lockable == resource.RLIM_INFINITY else lockable)


def _read(path: Path) -> str:
    """The text of a file; "" where there is none, as on other systems."""
    try:
        return path.read_text()
    except OSError:
        return ""
