"""Which backend does a call: the named one or refused with its reason, else the first that can."""

import warnings

from ringattn.kernels.cpu import CpuFlash
from ringattn.kernels.fa4 import FlashAttention4
from ringattn.kernels.reference import Reference
from ringattn.kernels.spec import Backend, CallSpec
from ringattn.kernels.torch_flash import TorchFlash

# In the order in which "auto" asks them.
BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (FlashAttention4(), TorchFlash(), CpuFlash(), Reference())
}


def explain(spec: CallSpec) -> dict[str, str | None]:
    """Each backend with the reason why it cannot do `spec`, or None if it can."""
    return {name: backend.refusal(spec) for name, backend in BACKENDS.items()}


def choose(spec: CallSpec, name: str = "auto") -> Backend:
    """The backend for `spec`.

    Raises ValueError for an unknown name, NotImplementedError naming every reason if none can do it exactly.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS)}, got {name!r}")
    reasons = explain(spec)
    if name != "auto":
        if reasons[name] is not None:
            raise NotImplementedError(f"backend {name!r} cannot do this call: {reasons[name]}. Asked for: {spec}")
        return BACKENDS[name]
    for candidate, reason in reasons.items():
        if reason is None:
            if candidate == "reference" and spec.device == "cuda":
                told = "; ".join(f"{other} {why}" for other, why in reasons.items() if why)
                warnings.warn(f"no flash kernel can do this call, falling back to plain torch: {told}", stacklevel=2)
            return BACKENDS[candidate]
    told = "; ".join(f"{candidate} {reason}" for candidate, reason in reasons.items())
    raise NotImplementedError(f"no installed backend can do this call exactly: {told}. Asked for: {spec}")
