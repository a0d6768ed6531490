"""What this machine is: software versions, GPUs, and how the GPUs are linked."""

import itertools
import platform
import re
import subprocess
from typing import Any

SECONDS = 10  # for a driver tool that hangs
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def machine() -> dict[str, Any]:
    """Versions; None for what is not there."""
    import torch

    return {
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "nccl": _nccl(),
    }


def gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {
            "index": index,
            "name": device.name,
            "memory_gib": round(device.total_memory / 2**30, 1),
            "compute_capability": f"{device.major}.{device.minor}",
        }
        for index, device in enumerate(found)
    ]


def links(count: int) -> list[dict[str, Any]]:
    """Each pair of GPUs: whether they read each other's memory, and the kind of link where nvidia-smi tells it."""
    import torch

    kinds = topology(_run("nvidia-smi", "topo", "-m") or "") if count > 1 else {}
    return [
        {"gpus": [a, b], "peer_access": torch.cuda.can_device_access_peer(a, b), "kind": kinds.get((a, b))}
        for a, b in itertools.combinations(range(count), 2)
    ]


def topology(text: str) -> dict[tuple[int, int], str]:
    """Kinds of links (NV18, PIX, SYS, ...) out of the matrix of `nvidia-smi topo -m`."""
    kinds = {}
    for line in ANSI.sub("", text).splitlines():
        row, *cells = line.split() or [""]
        if not re.fullmatch(r"GPU\d+", row) or (cells and re.fullmatch(r"GPU\d+", cells[0])):
            continue
        for column, kind in enumerate(cells):
            if re.fullmatch(r"NV\d+|PIX|PXB|PHB|NODE|SYS|X", kind) is None:
                break
            kinds[int(row.removeprefix("GPU")), column] = kind
    return kinds


def summary(pairs: list[dict[str, Any]]) -> list[str]:
    """One line per kind of link, with how many pairs have it."""
    kinds: dict[str, list[str]] = {}
    for pair in pairs:
        access = "peer access" if pair["peer_access"] else "no peer access"
        label = f"{pair['kind']}, {access}" if pair["kind"] else access
        kinds.setdefault(label, []).append("-".join(map(str, pair["gpus"])))
    lines = []
    for label, names in kinds.items():
        where = "all pairs" if len(kinds) == 1 else " ".join(names[:8]) + (" ..." if len(names) > 8 else "")
        lines.append(f"{label}: {where} ({len(names)})")
    return lines


def _driver() -> str | None:
    out = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return out.splitlines()[0].strip() if out and out.strip() else None


def _nccl() -> str | None:
    import torch

    if not torch.cuda.is_available() or not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
