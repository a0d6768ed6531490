"""A run whose numbers are bitwise the same each time: what has to be switched on for it, and what cannot be."""

import os
import warnings

import torch

from ringattn.kernels.registry import backends

# cuBLAS adds in one order only with a workspace of its own for each stream; read when a device's first handle is made.
WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def check_backend(name: str) -> None:
    """Raises ValueError for a kernel that is named and whose gradients differ from run to run."""
    if name == "auto" or backends()[name].capability.deterministic:
        return
    able = ", ".join(one for one, backend in backends().items() if backend.capability.deterministic)
    raise ValueError(
        f"run.deterministic=true: parallel.backend={name} does not promise equal gradients from run to run; use auto "
        f"or one of {able}"
    )


def be_deterministic() -> None:
    """Switches it on for this process, before a process group, a model or a GPU's first product is made.

    Afterwards torch raises RuntimeError, naming the operation, where it has no deterministic one, and so does the
    choice of a backend that has none.
    """
    os.environ.setdefault(*WORKSPACE)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # finds bugs, at a price
    torch.backends.cudnn.benchmark = False
    warnings.filterwarnings("error", message="deterministic=True: .* does not promise equal gradients")
