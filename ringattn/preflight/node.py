"""What one node says about itself: software, limits, folders. No communication."""

import hashlib
import os
import platform
import resource
import shutil
import socket
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import ringattn

SHARED_MEMORY = "/dev/shm"
PREFIXES = ("NCCL_", "TORCH_", "GLOO_", "PYTORCH_", "CUDA_", "RINGATTN_")


def examine(output: Path, cache: Path) -> dict[str, Any]:
    """Everything that needs neither a device nor another node, as JSON can hold it."""
    return {
        "host": socket.gethostname(),
        "versions": versions(),
        "environment": environment(),
        "limits": limits(),
        "folders": {"output": folder(output), "cache": folder(cache)},
    }


def versions() -> dict[str, str | None]:
    """What must be the same on all nodes; None for what is not there."""
    gpu = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpu else None,
        "transformers": _installed("transformers"),
        "ringattn": f"{ringattn.__version__}, sources {sources(Path(ringattn.__file__).parent)}",
        "gpus": f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}" if gpu else "none",
    }


def sources(package: Path) -> str:
    """A digest of a package's source files: a version number does not tell two check-outs apart."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def environment() -> dict[str, str]:
    """Variables that steer communication and devices, which are most often meant to be the same everywhere."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)}


def limits() -> dict[str, int | None]:
    """Open files and locked memory (bytes; None: no limit), bytes free in shared memory, and InfiniBand devices."""
    files, locked = (resource.getrlimit(what)[0] for what in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK))
    devices = Path("/sys/class/infiniband")
    return {
        "open_files": None if files == resource.RLIM_INFINITY else files,
        "locked_memory": None if locked == resource.RLIM_INFINITY else locked,
        "shared_memory": shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else 0,
        "infiniband": len(list(devices.iterdir())) if devices.is_dir() else 0,
    }


def folder(path: Path) -> dict[str, Any]:
    """Bytes free where `path` is or would be made, and why nothing can be written there, or None."""
    path = path.expanduser().resolve()
    existing = next(one for one in (path, *path.parents) if one.exists())
    found: dict[str, Any] = {"path": str(path), "free": 0, "error": None}
    try:
        found["free"] = shutil.disk_usage(existing).free
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(bytes(4096))
    except OSError as error:
        found["error"] = f"nothing can be written in {existing}: {error.strerror}"
    return found


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
