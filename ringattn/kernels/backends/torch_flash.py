"""The FlashAttention-2 kernel inside torch, on CUDA (`aten._flash_attention_forward` and `_backward`).

On Hopper it runs at about half the speed of FA3 and FA4: the fallback where neither is installed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from ringattn.kernels.backends.rows import pack_keys, unpack_keys
from ringattn.kernels.spec import Call, Capability, Grads, Options


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
        lengths = call.tensors(q.device)
        result, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, lengths.cu_q, lengths.cu_k, call.max_q, longest_keys(call), 0.0, is_causal(call), False,
            scale=options.scale, window_size_left=call.left, window_size_right=call.right, **_one_split(),
        )  # fmt: skip
        out.copy_(result)
        return torch.where(lse == float("inf"), float("-inf"), lse)  # its lse of a row without keys is +inf

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
        k, v = pack_keys(call, k, v)
        lengths = call.tensors(q.device)
        no_rng = torch.zeros(2, dtype=torch.uint64, device=q.device)
        with _deterministic(options.deterministic):
            dq, dk, dv = torch.ops.aten._flash_attention_backward(
                dout.contiguous(), q, k, v, out, lse.contiguous(), lengths.cu_q, lengths.cu_k,
                call.max_q, longest_keys(call), 0.0, is_causal(call), no_rng, no_rng,
                scale=options.scale, window_size_left=call.left, window_size_right=call.right,
            )  # fmt: skip
        grads.dq.copy_(dq)
        unpack_keys(call, grads, dk, dv)


def longest_keys(call: Call) -> int:
    """An upper bound of the key lengths, and of what an open window must reach.

    The kernel takes a window of this or more for an open one, and an open one beside a closed one for this many keys:
    both are wrong where a block has more queries than keys.
    """
    return max(call.max_k, call.max_q, call.right + 1)


def is_causal(call: Call) -> bool:
    return call.right == 0


@cache
def _one_split() -> dict[str, int]:
    """Where the kernel can split the keys by itself (torch 2.13), its automatic choice gave NaN with varlen."""
    arguments = torch.ops.aten._flash_attention_forward.default._schema.arguments
    return {"num_splits": 1} if any(argument.name == "num_splits" for argument in arguments) else {}


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """The operator has no argument for it and reads torch's global switch."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(wanted or before, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
