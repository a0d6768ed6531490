"""The FlashAttention-2 kernel inside torch, on CUDA (`aten._flash_attention_forward` and `_backward`).

On Hopper it runs at about half the speed of FA3 and FA4: the fallback where neither is installed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from ringattn.kernels.backends.counted import backward_within_count
from ringattn.kernels.backends.varlen import Varlen, kept_with_call, minus_infinity_of_keyless, pack_keys, unpack_keys
from ringattn.kernels.spec import Call, Capability, Grads, Options, SavedCall


class TorchFlash:
    name = "torch"
    capability = Capability(
        devices=("cuda",),
        dtypes=(torch.float16, torch.bfloat16),
        max_head_dim=256,
        head_dim_multiple=8,
        compute_capability=((8, 0), (99, 0)),
        deterministic=True,
    )

    def missing(self) -> str | None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, options: Options, out: Tensor) -> Tensor:
        k, v = pack_keys(call, k, v)
        x = _lengths(call, options, q.device)
        result, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, x.cu_q, x.cu_k, x.max_q, x.max_k, 0.0, x.causal, False,
            scale=options.scale, window_size_left=x.left, window_size_right=x.right, **_one_split(),
        )  # fmt: skip
        out.copy_(result)
        return minus_infinity_of_keyless(lse)

    def backward(self, dout: Tensor, saved: SavedCall, grads: Grads) -> None:
        backward_within_count(_backward, dout, saved, grads)


def _backward(dout: Tensor, saved: SavedCall, grads: Grads) -> None:
    q, k, v, out, lse, call, options = saved
    k, v = pack_keys(call, k, v)
    x = _lengths(call, options, q.device)
    no_rng = torch.zeros(2, dtype=torch.uint64, device=q.device)  # asked for even without dropout
    with _deterministic(options.deterministic):
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout.contiguous(), q, k, v, out, lse.contiguous(), x.cu_q, x.cu_k,
            x.max_q, x.max_k, 0.0, x.causal, no_rng, no_rng,
            scale=options.scale, window_size_left=x.left, window_size_right=x.right,
        )  # fmt: skip
    grads.dq.copy_(dq)
    unpack_keys(call, grads, dk, dv)


@kept_with_call
def _lengths(call: Call, options: Options, device: torch.device) -> Varlen:
    return Varlen.end_to_end(call, device)


@cache
def _one_split() -> dict[str, int]:
    """Where the kernel can split the keys by itself (torch 2.13), its automatic choice gave NaN with varlen."""
    arguments = torch.ops.aten._flash_attention_forward.default._schema.arguments
    return {"num_splits": 1} if any(argument.name == "num_splits" for argument in arguments) else {}


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """The operator has no argument for it and reads torch's global switch, which is put back."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(wanted or before, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
