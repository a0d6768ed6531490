"""FlashAttention-3 (operators `torch.ops.flash_attn_3`): Hopper only.

No distribution names it: the operators come from a source build (module `flash_attn_interface`), from the xformers
wheel, or from a shared library that RINGATTN_FA3_LIBRARY names. PyPI's `flash-attn-3` is a placeholder without them.
Some builds leave features out (xformers' has no softcap): the self-test finds that. `num_splits=2` keeps float32
partial results, which merging could use, but in variable-length calls it is only a bound: most blocks are not split,
and their partial results are not written (seen on an H200).
"""

import ctypes
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ringattn.kernels.backends.rows import rows_of_heads
from ringattn.kernels.backends.varlen import Varlen, infinity_of_keyless, kept_with_call
from ringattn.kernels.probing import parameters, require, why_missing
from ringattn.kernels.spec import Call, Capability, Grads, Options, SavedCall

LIBRARY = "RINGATTN_FA3_LIBRARY"
_MODULES = ("flash_attn_3._C", "flash_attn_interface")  # of a source build; importing one registers the operators
_RUNTIME = "libcudart.so.12"
_NEEDED = {
    "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale",
    "window_size_left", "window_size_right",
}  # fmt: skip


class FlashAttention3:
    name = "fa3"
    capability = Capability(
        devices=("cuda",),
        dtypes=(torch.float16, torch.bfloat16),
        max_head_dim=256,
        head_dim_multiple=8,
        compute_capability=((9, 0), (10, 0)),
        softcap=True,
        unequal_head_dims=True,
        deterministic=True,
        distributions=("flash-attn-3", "xformers"),
    )

    def missing(self) -> str | None:
        return why_missing(_kernels)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, options: Options, out: Tensor) -> Tensor:
        forward, _ = _kernels()
        arguments = _forward_arguments(call, options, q.device)
        return forward(q, k, v, **arguments, **_own_arguments(forward, {"out": out, "num_splits": 1}))[1]

    def backward(self, dout: Tensor, saved: SavedCall, grads: Grads) -> None:
        q, k, v, out, lse, call, options = saved
        _, backward = _kernels()
        inputs = rows_of_heads(dout), q, k, v, out, infinity_of_keyless(lse, call)
        wanted = {"dq": grads.dq, "dk": grads.dk, "dv": grads.dv, "deterministic": options.deterministic}
        backward(*inputs, **_backward_arguments(call, options, q.device), **_own_arguments(backward, wanted))


@kept_with_call
def _forward_arguments(call: Call, options: Options, device: torch.device) -> dict[str, Any]:
    return _own_arguments(_kernels()[0], _arguments(call, options, device))


@kept_with_call
def _backward_arguments(call: Call, options: Options, device: torch.device) -> dict[str, Any]:
    return _own_arguments(_kernels()[1], _arguments(call, options, device))


def _arguments(call: Call, options: Options, device: torch.device) -> dict[str, Any]:
    """Under our names, for both directions."""
    lengths = Varlen.in_place(call, device)
    return lengths.named(options) | {"seqused_k": lengths.used_k}


# What a build does that lacks the argument: only this value can be asked of it.
_OPTIONAL = {"softcap": 0.0, "deterministic": False, "num_splits": 1}


def _own_arguments(operator: Callable[..., Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """The arguments under the operator's own names; NotImplementedError for a feature that it has no argument for."""
    named = {}
    for name, value in wanted.items():
        own = _own_name(operator, name)
        if own is not None:
            named[own] = value
        elif name not in _OPTIONAL or value != _OPTIONAL[name]:
            raise NotImplementedError(f"this build of FlashAttention-3 has no {name}")
    return named


@cache
def _own_name(operator: Callable[..., Any], name: str) -> str | None:
    """What an operator calls an argument, or None. Builds differ: `out` or `out_`, `dq` or `dq_`, `is_causal` or
    `causal`."""
    names = parameters(operator)
    return next((own for own in (name, f"{name}_", f"is_{name}") if own in names), None)


@cache  # what raises is not kept, so an installation that was repaired is found
def _kernels() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two operators, or ImportError with what was tried."""
    tried: list[str] = []
    operators = torch.ops.flash_attn_3
    for source, load in _operator_sources():
        try:
            load()
        except Exception as error:  # a library for another torch or CUDA raises OSError, RuntimeError and others
            tried.append(f"{source}: {type(error).__name__}: {error}")
            continue
        if hasattr(operators, "fwd") and hasattr(operators, "bwd"):
            for operator in (operators.fwd, operators.bwd):
                require(operator, str(operator), _NEEDED)
            return operators.fwd, operators.bwd
        tried.append(f"{source}: registers no flash_attn_3::fwd and bwd")
    told = "; ".join(tried[1:])
    hint = f"is not installed: pip install xformers, build flash-attention's hopper folder, or set {LIBRARY}"
    raise ImportError(f"{hint} ({told})" if told else hint)


def _operator_sources() -> Iterator[tuple[str, Callable[[], object]]]:
    """Where the operators may come from, in order: a name, and how to load them."""
    yield "operators loaded before", lambda: None
    for module in _MODULES:
        if importlib.util.find_spec(module.partition(".")[0]) is not None:
            yield module, lambda module=module: importlib.import_module(module)  # type: ignore[misc]
    for library in _in_package("xformers", "flash_attn_3/_C*.so"):  # found without importing xformers
        yield str(library), lambda library=library: _open(library)  # type: ignore[misc]
    named = os.environ.get(LIBRARY)
    if named:
        yield f"{LIBRARY}={named}", lambda: _open(Path(named))


def _open(library: Path) -> None:
    """Load a shared library of operators. A CUDA 12 build under a CUDA 13 torch needs its own runtime loaded first: it
    is looked for beside the library, and in NVIDIA's wheel."""
    beside = library.parent / _RUNTIME
    runtimes = [beside] if beside.exists() else _in_package("nvidia", f"cuda_runtime/lib/{_RUNTIME}")
    for runtime in runtimes[:1]:
        ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
    torch.ops.load_library(str(library))


def _in_package(package: str, pattern: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    return [path for folder in folders for path in sorted(Path(folder).glob(pattern))]
