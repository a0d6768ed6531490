"""torch's CPU flash attention: the same plans as on GPUs, on any laptop.

The operator takes one square causal or one full block, or an additive mask; blocks are walked one by one, which is also
faster than one masked call. A causal block with more keys than queries is split into its full and its square part.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringattn.kernels.backends.reference import allowed_pairs
from ringattn.kernels.merge import merge_
from ringattn.kernels.spec import Block, Call, Capability, Grads, Options, accumulation_dtype

_OPERATOR = "_scaled_dot_product_flash_attention_for_cpu"


def _forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return getattr(torch.ops.aten, _OPERATOR)(*args, **kwargs)


def _backward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return getattr(torch.ops.aten, _OPERATOR + "_backward")(*args, **kwargs)


class CpuFlash:
    name = "cpu"
    capability = Capability(devices=("cpu",), deterministic=True)

    def missing(self) -> str | None:
        return None if hasattr(torch.ops.aten, _OPERATOR) else f"torch {torch.__version__} has no {_OPERATOR}"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, options: Options, out: Tensor) -> Tensor:
        lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=accumulation_dtype(q.dtype))
        for block, keyless in _blocks(call):
            out[keyless] = 0
            rows = slice(block.q[0] - call.q[0], block.q[1] - call.q[0])
            parts = [
                _forward(
                    *batched(q[rows], k[part.keys], v[part.keys]),
                    0.0,
                    part.causal,
                    attn_mask=part.mask,
                    scale=options.scale,
                )
                for part in _parts(block, call, q)
            ]
            results = [(flat(part_out), part_lse[0]) for part_out, part_lse in parts]
            out[rows], lse[:, rows] = results[0] if len(results) == 1 else merged(results, q[rows], v.shape[2])
        return lse

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
        for block, keyless in _blocks(call):
            grads.dq[keyless] = 0
            rows = slice(block.q[0] - call.q[0], block.q[1] - call.q[0])
            dq = torch.zeros_like(q[rows], dtype=accumulation_dtype(q.dtype))
            for part in _parts(block, call, q):
                tensors = batched(dout[rows], q[rows], k[part.keys], v[part.keys], out[rows])
                row_lse = lse[None, :, rows].contiguous()
                dq_part, dk, dv = _backward(
                    *tensors, row_lse, 0.0, part.causal, attn_mask=part.mask, scale=options.scale
                )
                dq += flat(dq_part)
                grads.dk[part.keys], grads.dv[part.keys] = flat(dk), flat(dv)
            grads.dq[rows] = dq.to(q.dtype)


def _blocks(call: Call) -> Iterator[tuple[Block, slice]]:
    """The call's blocks without their first rows that see no key, and those rows: the operator's lse of them is 0."""
    for block in call.blocks:
        n, m = block.q[1] - block.q[0], block.k[1] - block.k[0]
        first = block.q[0] + (min(n, max(0, n - m - call.right)) if call.right >= 0 else 0)
        yield replace(block, q=(first, block.q[1])), slice(block.q[0] - call.q[0], first - call.q[0])


class _Part(NamedTuple):
    """Keys of a block that the operator can take in one go."""

    keys: slice
    causal: bool = False
    mask: Tensor | None = None  # additive, (n, m)


def _parts(block: Block, call: Call, q: Tensor) -> list[_Part]:
    """None for a block without queries or keys, with which the operator would kill the process."""
    n, m = block.q[1] - block.q[0], block.k[1] - block.k[0]
    start, stop = block.k[0] - call.k[0], block.k[1] - call.k[0]
    if not n or not m:
        return []
    if (call.right < 0 or call.right >= n - 1) and (call.left < 0 or call.left >= m - 1):
        return [_Part(slice(start, stop))]
    if call.right == 0 and (call.left < 0 or call.left >= m - 1) and m >= n:
        full = [_Part(slice(start, stop - n))] if m > n else []
        return [*full, _Part(slice(stop - n, stop), causal=True)]
    allowed = allowed_pairs(block, call.left, call.right, (0, n), q.device)
    mask = torch.zeros(n, m, dtype=q.dtype, device=q.device).masked_fill(~allowed, float("-inf"))
    return [_Part(slice(start, stop), mask=mask)]


def merged(results: list[tuple[Tensor, Tensor]], q: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(q.dtype)
    out = q.new_zeros(q.shape[0], q.shape[1], value_dim, dtype=dtype)
    lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=dtype)
    for part_out, part_lse in results:
        merge_(out, lse, part_out, part_lse)
    return out, lse


def batched(*tensors: Tensor) -> list[Tensor]:
    """(T, H, D) -> (1, H, T, D)"""
    return [x.transpose(0, 1)[None] for x in tensors]


def flat(x: Tensor) -> Tensor:
    """(1, H, T, D) -> (T, H, D)"""
    return x[0].transpose(0, 1)
