"""Wrong numbers that a self-test found, kept on disk: the next process need not compile for minutes to find them again.

Nothing else is kept. What a kernel raises may have its cause outside of what is named here (memory, a compiler that is
not there), and is found anew. A kernel that is right is tested by every process: it compiles what the call needs
anyhow, Triton and fla keep that on disk themselves, and tiles that a process chose anew are tested anew. The ranks of
one run test side by side, which takes no longer than one.
"""

import hashlib
import importlib.metadata
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ringattn.kernels.tuning.store import Store
from ringattn.recurrent.kernels.contract import Kernel, Signature

KIND = "selftest"
# Of packages that compile: which of their kernels, compilers or tiles they take.
_PREFIXES = ("FLA_", "TRITON_", "MAMBA_")


def kept_failure(kernel: Kernel, signature: Signature) -> str | None:
    """What an earlier process found wrong, with where that is kept, or None."""
    store = Store(kind=KIND)
    found = store.read(_key(kernel, signature))
    if found is None:
        return None
    return f"{found.get('reason')}, as found on {found.get('found')}; remove {store.path} to test it again"


def keep_failure(kernel: Kernel, signature: Signature, reason: str) -> None:
    """For later processes on a machine like this one."""
    Store(kind=KIND).write(
        _key(kernel, signature), {"reason": reason, "found": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}
    )


def _key(kernel: Kernel, signature: Signature) -> str:
    """All that a result depends on: the call, the machine, versions, settings of compilers and our own code."""
    settings = {name: value for name, value in os.environ.items() if name.startswith(_PREFIXES)}
    facts = {
        "kernel": kernel.name,
        "signature": repr(signature),
        "machine": _machine(signature.device),
        "versions": {name: _version(name) for name in ("torch", "triton", *kernel.distributions)},
        "settings": dict(sorted(settings.items())),
        "code": _code(),
    }
    return f"{kernel.name} {hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}"


def _machine(device: str) -> tuple[Any, ...]:
    if device != "cuda" or not torch.cuda.is_available():
        return (device,)
    one = torch.cuda.get_device_properties(torch.cuda.current_device())
    return one.name, one.major, one.minor, one.multi_processor_count, torch.version.cuda, torch.version.hip


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def _code() -> str:
    """A digest of the adapters, the test and its judge."""
    return _digest(sorted(Path(__file__).parent.glob("*.py")))


def _digest(paths: Iterable[Path]) -> str:
    whole = hashlib.sha256()
    for path in paths:
        whole.update(path.read_bytes())
    return whole.hexdigest()
