"""FlashAttention-2 (distribution `flash-attn`): Ampere and newer; softcap besides what torch's copy of it can do.

ALiBi is not offered. Dropout is refused: the kernel draws its mask by the place inside of a call, so that the result
would depend on how a plan cuts the sequence.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ringattn.kernels.backends.counted import backward_within_count
from ringattn.kernels.backends.rows import rows_of_heads
from ringattn.kernels.backends.varlen import (
    Varlen,
    infinity_of_keyless,
    kept_with_call,
    minus_infinity_of_keyless,
    pack_keys,
    unpack_keys,
)
from ringattn.kernels.probing import require, why_missing
from ringattn.kernels.spec import Call, CallSpec, Capability, Grads, Options, SavedCall

Kernels = tuple[Callable[..., Any], Callable[..., Any]]

_NEEDED = {
    "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "dropout_p", "softmax_scale", "causal",
    "window_size_left", "window_size_right", "softcap", "alibi_slopes",
}  # fmt: skip


class _NoDropout(Capability):
    """Says why dropout is refused, as users know that the package has it."""

    def refusal(self, spec: CallSpec) -> str | None:
        reason = super().refusal(replace(spec, dropout_p=0.0))
        if reason is None and spec.dropout_p:
            return "has dropout, but it depends on how the sequence is split"
        return reason


class FlashAttention2:
    name = "fa2"
    capability: Capability = _NoDropout(
        devices=("cuda",),
        dtypes=(torch.float16, torch.bfloat16),
        max_head_dim=256,
        head_dim_multiple=8,
        compute_capability=((8, 0), (99, 0)),
        softcap=True,
        deterministic=True,
        distributions=("flash-attn",),
    )

    def missing(self) -> str | None:
        return why_missing(_kernels)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, options: Options, out: Tensor) -> Tensor:
        k, v = pack_keys(call, k, v)
        result, lse, *_ = _kernels()[0](q, k, v, return_softmax=False, **_arguments(call, options, q.device))
        out.copy_(result)
        return minus_infinity_of_keyless(lse)

    def backward(self, dout: Tensor, saved: SavedCall, grads: Grads) -> None:
        backward_within_count(_backward, dout, saved, grads)


def _backward(dout: Tensor, saved: SavedCall, grads: Grads) -> None:
    q, k, v, out, lse, call, options = saved
    k, v = pack_keys(call, k, v)
    dk, dv = (grads.dk, grads.dv) if call.dense_keys else (torch.empty_like(k), torch.empty_like(v))
    _kernels()[1](
        rows_of_heads(dout), q, k, v, out, infinity_of_keyless(lse, call), dq=grads.dq, dk=dk, dv=dv,
        deterministic=options.deterministic, **_arguments(call, options, q.device),
    )  # fmt: skip
    if not call.dense_keys:
        unpack_keys(call, grads, dk, dv)


@kept_with_call
def _arguments(call: Call, options: Options, device: torch.device) -> dict[str, Any]:
    """Those of both directions. What is not used is passed as well, so that no release's defaults count."""
    return Varlen.end_to_end(call, device).named(options) | {"dropout_p": 0.0, "alibi_slopes": None}


@cache  # what raises is not kept, so an installation that was repaired is found
def _kernels() -> Kernels:
    """Forward and backward of the package, or ImportError. FlashAttention-4 has the same import package, so the
    distribution is asked, and the signatures."""
    try:
        importlib.metadata.distribution("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError("is not installed: pip install 'ringattn[fa2]'") from None
    try:
        from flash_attn import flash_attn_interface as interface
    except Exception as error:  # a build for another torch raises other errors than ImportError
        raise ImportError(f"is installed but cannot be imported: {type(error).__name__}: {error}") from error
    return (
        require(_package_function(interface, "forward"), "_flash_attn_varlen_forward", _NEEDED | {"return_softmax"}),
        require(
            _package_function(interface, "backward"), "_flash_attn_varlen_backward", _NEEDED | {"dq", "deterministic"}
        ),
    )


def _package_function(interface: Any, direction: str) -> Callable[..., Any] | None:
    """The torch operator where there is one (2.7 and newer), else the function."""
    name = f"flash_attn_varlen_{direction}"
    return getattr(interface, f"_wrapped_{name}", None) or getattr(interface, f"_{name}", None)
