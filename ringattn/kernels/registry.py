"""Which backend does a call: the one that is named, or an error with the reason; else the first that can.

A backend of another package is found by the entry-point group `ringattn.kernels`: its entry's name is the backend's
name, and its object a class (or function without arguments) that makes an object of the `Backend` protocol. One that
is broken, or was written for another contract, is left out with a warning, and is an error where it is asked for.
"""

import importlib.metadata
import inspect
import warnings
from functools import cache

from ringattn.environment import BACKEND, logger
from ringattn.kernels import selftest
from ringattn.kernels.backends.cpu import CpuFlash
from ringattn.kernels.backends.fa2 import FlashAttention2
from ringattn.kernels.backends.fa3 import FlashAttention3
from ringattn.kernels.backends.fa4 import FlashAttention4
from ringattn.kernels.backends.flex import FlexAttention
from ringattn.kernels.backends.npu import NpuFusion
from ringattn.kernels.backends.reference import Reference
from ringattn.kernels.backends.torch_flash import TorchFlash
from ringattn.kernels.backends.xpu import XpuFlash
from ringattn.kernels.spec import Backend, CallSpec, Capability

ENTRY_POINTS = "ringattn.kernels"


def builtin() -> tuple[Backend, ...]:
    """The backends of this package, in the order in which "auto" asks them: a new one is a file and its row here."""
    return (
        FlashAttention4(),
        FlashAttention3(),
        FlashAttention2(),
        TorchFlash(),
        FlexAttention(),
        NpuFusion(),
        XpuFlash(),
        CpuFlash(),
        Reference(),
    )


@cache
def backends() -> dict[str, Backend]:
    """All backends by name, in the order in which "auto" asks them: other packages' come before the reference."""
    found = {backend.name: backend for backend in builtin()}
    judge = found.pop("reference")
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if entry.name in found or entry.name == judge.name:
            warnings.warn(f"entry point {entry.value}: a backend {entry.name!r} exists already; ignored", stacklevel=2)
            continue
        made, defect = _plugged_in(entry)
        if made is None:
            warnings.warn(f"backend {entry.name!r}: {defect}; ignored", stacklevel=2)
        else:
            found[entry.name] = made
    return found | {judge.name: judge}


def _plugged_in(entry: importlib.metadata.EntryPoint) -> tuple[Backend | None, str]:
    """The backend of another package, or None and what is wrong with it."""
    try:
        made = entry.load()()
    except Exception as error:  # whatever another package raises when it is imported
        return None, f"entry point {entry.value} cannot be loaded: {type(error).__name__}: {error}"
    defect = defect_of(made)
    return (made, "") if defect is None else (None, f"entry point {entry.value} is no backend: it {defect}")


def defect_of(candidate: object) -> str | None:
    """What an object lacks to be a `Backend`: a method, the arguments of one, or its capability; None if nothing.

    Asked once, when a backend is found: a wrong signature would else be a TypeError in the middle of a step.
    """
    for name in ("missing", "forward", "backward"):
        method = getattr(candidate, name, None)
        if not callable(method):
            return f"has no {name}"
        needed = list(inspect.signature(getattr(Backend, name)).parameters)[1:]
        own = inspect.signature(method)
        try:
            own.bind(*needed)
        except TypeError:
            return (
                f"cannot be called as {name}({', '.join(needed)}), the contract of ringattn.kernels.spec.Backend: "
                f"its own is {name}({', '.join(own.parameters)})"
            )
    if not isinstance(getattr(candidate, "capability", None), Capability):
        return "has no capability, a ringattn.kernels.spec.Capability"
    return None


def refusal(backend: Backend, spec: CallSpec) -> str | None:
    """Why a backend cannot do `spec`, or None: what it declares, whether it is installed, and its self-test."""
    return backend.capability.refusal(spec) or backend.missing() or selftest.failure(backend, spec)


def explain(spec: CallSpec) -> dict[str, str | None]:
    """Each backend with the reason why it cannot do `spec`, or None if it can."""
    return {name: refusal(backend, spec) for name, backend in backends().items()}


def choose(spec: CallSpec, name: str = "auto") -> Backend:
    """The backend for `spec`: the one that is named, else the one of RINGATTN_BACKEND, else the first that can do it.

    Raises ValueError for a name that is unknown, or of a plug-in that is no backend, with what is wrong with it;
    NotImplementedError naming every reason if no backend can do it exactly.
    """
    if name == "auto":
        name = BACKEND.read() or "auto"
    return _chosen(spec, name)


def _warn_if_not_deterministic(backend: Backend, spec: CallSpec) -> None:
    if spec.deterministic and not backend.capability.deterministic:
        text = f"deterministic=True: {backend.name} does not promise equal gradients from run to run"
        warnings.warn(text, stacklevel=5)


@cache  # a layer asks at every call; what raises is not kept, so a repaired installation is found
def _chosen(spec: CallSpec, name: str) -> Backend:
    backend = _first_able(spec) if name == "auto" else _named_backend(spec, name)
    logger().info("backend %s, asked for %s: %s", backend.name, name, spec)
    return backend


def _named_backend(spec: CallSpec, name: str) -> Backend:
    known = backends()
    if name not in known:
        # The warning of a broken plug-in may be long past. Loading it again costs nothing: this is an error anyhow.
        defects = [_plugged_in(x)[1] for x in importlib.metadata.entry_points(group=ENTRY_POINTS) if x.name == name]
        told = "".join(f"; {defect}" for defect in defects if defect)
        raise ValueError(f"backend must be auto or one of {', '.join(known)}, got {name!r}{told}")
    reason = refusal(known[name], spec)
    if reason is not None:
        raise NotImplementedError(f"backend {name!r} cannot do this call: it {reason}. Asked for: {spec}")
    _warn_if_not_deterministic(known[name], spec)
    return known[name]


def _first_able(spec: CallSpec) -> Backend:
    reasons: dict[str, str] = {}
    for name, backend in backends().items():
        reason = refusal(backend, spec)
        if reason is None:
            if name == "reference" and spec.device == "cuda":
                _warn_of_reference("; ".join(f"{other} {why}" for other, why in reasons.items()))
            _warn_if_not_deterministic(backend, spec)
            return backend
        reasons[name] = reason
    told = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
    raise NotImplementedError(f"no installed backend can do this call exactly: {told}. Asked for: {spec}")


@cache
def _warn_of_reference(told: str) -> None:
    warnings.warn(f"no flash kernel can do this call, falling back to plain torch: {told}", stacklevel=4)
