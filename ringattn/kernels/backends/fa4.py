"""FlashAttention-4 (distribution `flash-attn-4`, CuTe DSL): Hopper and newer, compiled at first use."""

import importlib.metadata
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ringattn.kernels.backends.fa4_sums import backward_into
from ringattn.kernels.backends.rows import rows_of_heads
from ringattn.kernels.backends.varlen import Varlen, kept_with_call
from ringattn.kernels.probing import require, why_missing
from ringattn.kernels.spec import Call, Capability, Grads, Options, SavedCall

_NEEDED = {"cu_seqlens_q", "cu_seqlens_k", "seqused_k", "window_size_left", "window_size_right", "softcap"}


class FlashAttention4:
    name = "fa4"
    capability = Capability(
        devices=("cuda",),
        dtypes=(torch.float16, torch.bfloat16),
        max_head_dim=256,
        head_dim_multiple=8,
        compute_capability=((9, 0), (99, 0)),
        softcap=True,
        deterministic=True,
        adds=True,
        distributions=("flash-attn-4",),
    )

    def missing(self) -> str | None:
        return why_missing(_kernels)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, options: Options, out: Tensor) -> Tensor:
        forward, _ = _kernels()
        return forward(q, k, v, out=out, return_lse=True, **_arguments(call, options, q.device))[1]

    def backward(self, dout: Tensor, saved: SavedCall, grads: Grads) -> None:
        q, k, v, out, lse, call, options = saved
        _, backward = _kernels()
        inputs = q, k, v, out, rows_of_heads(dout), lse.contiguous()
        keywords = {"deterministic": options.deterministic, **_arguments(call, options, q.device)}
        if any(total is not None for total in grads.sums):
            backward_into(sys.modules[backward.__module__], grads, inputs, keywords)
        else:
            backward(*inputs, dq=grads.dq, dk=grads.dk, dv=grads.dv, **keywords)


@kept_with_call
def _arguments(call: Call, options: Options, device: torch.device) -> dict[str, Any]:
    """An open side of the window is None to this package, and beside `causal` it takes no window."""
    lengths = Varlen.in_place(call, device)
    left = None if lengths.left < 0 else lengths.left
    right = None if lengths.right < 0 or lengths.causal else lengths.right
    window = {"window_size_left": left, "window_size_right": right}
    return lengths.named(options) | window | {"seqused_k": lengths.used_k}


@cache  # what raises is not kept, so an installation that was repaired is found
def _kernels() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two functions, or ImportError. The import package `flash_attn` is also FlashAttention-2's, so the
    distribution and the signatures are asked, not the module."""
    try:
        importlib.metadata.distribution("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError("is not installed: pip install 'ringattn[fa4]'") from None
    try:
        from flash_attn.cute import interface
    except Exception as error:  # a CUDA library that is missing raises other errors than ImportError
        raise ImportError(f"is installed but cannot be imported: {type(error).__name__}: {error}") from error
    forward = getattr(interface, "_flash_attn_fwd", None)
    backward = getattr(interface, "_flash_attn_bwd", None)
    return (
        require(forward, "_flash_attn_fwd", _NEEDED | {"out", "return_lse"}),
        require(backward, "_flash_attn_bwd", _NEEDED | {"dq", "dk", "dv", "deterministic"}),
    )
