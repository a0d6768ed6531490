"""Which kernel computes a recurrence."""

from ringattn.recurrent.kernels.chunked import Chunked
from ringattn.recurrent.kernels.contract import Inputs, Kernel
from ringattn.recurrent.kernels.tokens import Tokens

KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (Chunked(), Tokens())}


def choose_kernel(x: Inputs, backend: str = "auto") -> Kernel:
    """The kernel of a name, or the first that can do this call.

    Raises ValueError for a name that is not known, NotImplementedError with every kernel's reason if none can.
    """
    if backend != "auto" and backend not in KERNELS:
        raise ValueError(f"backend must be auto or one of {', '.join(KERNELS)}, got {backend!r}")
    reasons = []
    for kernel in KERNELS.values() if backend == "auto" else [KERNELS[backend]]:
        reason = kernel.why_not(x)
        if not reason:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    raise NotImplementedError(f"no kernel can do this recurrence: {'; '.join(reasons)}")
