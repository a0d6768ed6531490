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
from ringattn.kernels.probing import require, why_missing
from ringattn.kernels.spec import Call, Capability, Grads, Options

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
    )

    def missing(self) -> str | None:
        return why_missing(_kernels)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, options: Options, out: Tensor) -> Tensor:
        forward, _ = _kernels()
        return forward(q, k, v, out=out, return_lse=True, **_arguments(call, options, q.device))[1]

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        call: Call,
        options: Options,
        grads: Grads,
    ) -> None:
        _, backward = _kernels()
        inputs = q, k, v, out, rows_of_heads(dout), lse.contiguous()
        keywords = {"deterministic": options.deterministic, **_arguments(call, options, q.device)}
        if any(total is not None for total in grads.sums):
            backward_into(sys.modules[backward.__module__], grads, inputs, keywords)
        else:
            backward(*inputs, dq=grads.dq, dk=grads.dk, dv=grads.dv, **keywords)


def _arguments(call: Call, options: Options, device: torch.device) -> dict[str, Any]:
    lengths = call.tensors(device)
    causal = call.right == 0 and call.left < 0
    return {
        "cu_seqlens_q": lengths.cu_q,
        "cu_seqlens_k": lengths.cu_k if call.dense_keys else lengths.k_offsets,
        "seqused_k": None if call.dense_keys else lengths.k_lens,
        "max_seqlen_q": call.max_q,
        "max_seqlen_k": call.max_k,
        "softmax_scale": options.scale,
        "causal": causal,
        "softcap": options.softcap,
        "window_size_left": None if causal or call.left < 0 else call.left,
        "window_size_right": None if causal or call.right < 0 else call.right,
    }


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
