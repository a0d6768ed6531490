"""Which kernel computes a recurrence: the one that is named, or an error with the reason; else the first that can."""

import warnings
from functools import cache

from ringattn.environment import logger
from ringattn.recurrent.kernels.chunked import Chunked
from ringattn.recurrent.kernels.contract import Kernel, Own, Signature
from ringattn.recurrent.kernels.fla import Fla
from ringattn.recurrent.kernels.mamba import Mamba
from ringattn.recurrent.kernels.selftest import failure
from ringattn.recurrent.kernels.tokens import Tokens

# In the order in which "auto" asks them: a new one is a file and its row here.
KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (Mamba(), Fla(), Chunked(), Tokens())}


def refusal(kernel: Kernel, signature: Signature) -> tuple[str, str] | None:
    """Where a kernel stops for a call, "call", "package" or "self-test", and why; None if it can do it."""
    if reason := kernel.refusal(signature):
        return "call", reason
    if reason := kernel.missing(signature):
        return "package", reason
    if not isinstance(kernel, Own) and (reason := failure(kernel, signature)):
        return "self-test", reason
    return None


@cache  # a layer asks at every call; what raises is not kept, so a repaired installation is found
def choose_kernel(signature: Signature, backend: str = "auto") -> Kernel:
    """The kernel of a name, or the first that can do this call.

    Raises ValueError for a name that is not known, NotImplementedError with the reason if the one that is named cannot.
    """
    if backend != "auto" and backend not in KERNELS:
        raise ValueError(f"backend must be auto or one of {', '.join(KERNELS)}, got {backend!r}")
    reasons: list[str] = []
    for kernel in KERNELS.values() if backend == "auto" else [KERNELS[backend]]:
        stopped = refusal(kernel, signature)
        if stopped is None:
            if kernel.name == "torch" and backend == "auto" and signature.device == "cuda":
                told = "; ".join(reasons)
                warnings.warn(f"no fused kernel can do this recurrence, plain torch does it: {told}", stacklevel=5)
            logger().info("recurrent kernel %s, asked for %s: %s", kernel.name, backend, signature)
            return kernel
        reasons.append(f"{kernel.name} {stopped[1]}")
    raise NotImplementedError(f"no kernel can do this recurrence: {'; '.join(reasons)}. Asked for: {signature}")
