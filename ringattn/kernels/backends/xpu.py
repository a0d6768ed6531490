"""Intel GPUs: torch's SYCL flash attention (`aten._scaled_dot_product_flash_attention` on XPU), block by block.

Tested against fakes only, never on a device. The kernel takes one block at a time, without window, softcap or dropout:
these are refused. Its causal corner differs between versions, so only square blocks are called causal: the keys before
the square are a second, full call. Kernels from a hub are not used: nothing is downloaded implicitly.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringattn.kernels.backends.cpu import batched, flat, merged
from ringattn.kernels.spec import Block, Call, Capability, Grads, Options, accumulation_dtype

_OPERATOR = "_scaled_dot_product_flash_attention"


class XpuFlash:
    name = "xpu"
    capability = Capability(
        devices=("xpu",),
        dtypes=(torch.float16, torch.bfloat16),
        max_head_dim=256,
        head_dim_multiple=8,
        window=False,
    )

    def missing(self) -> str | None:
        if not torch.xpu.is_available():
            return "needs an Intel GPU and torch's XPU build, and torch sees none"
        for operator in (_OPERATOR, f"{_OPERATOR}_backward"):
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", "XPU"):
                return f"torch {torch.__version__} has no {operator} on XPU"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, options: Options, out: Tensor) -> Tensor:
        forward, _ = _kernels()
        lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=accumulation_dtype(q.dtype))
        out.zero_()
        for block in call.blocks:
            results = []
            rows, parts = _parts(block, call)
            for part in parts:
                tensors = batched(q[rows], k[part.keys], v[part.keys])
                part_out, part_lse, *_ = forward(*tensors, 0.0, part.causal, False, scale=options.scale)
                results.append((flat(part_out), part_lse[0]))
            if results:
                whole = results[0] if len(results) == 1 else merged(results, q[rows], v.shape[2])
                out[rows], lse[:, rows] = whole
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
        _, backward = _kernels()
        no_rng = torch.zeros((), dtype=torch.int64, device=q.device)
        for grad in grads:
            grad.zero_()
        for block in call.blocks:
            rows, parts = _parts(block, call)
            dq = torch.zeros_like(q[rows], dtype=accumulation_dtype(q.dtype))
            for part in parts:
                tensors = batched(dout[rows], q[rows], k[part.keys], v[part.keys], out[rows])
                queries, keys = rows.stop - rows.start, part.keys.stop - part.keys.start
                dq_part, dk, dv = backward(
                    *tensors, lse[None, :, rows].contiguous(), None, None, queries, keys, 0.0, part.causal,
                    no_rng, no_rng, scale=options.scale,
                )  # fmt: skip
                dq += flat(dq_part)
                grads.dk[part.keys], grads.dv[part.keys] = flat(dk), flat(dv)
            grads.dq[rows] = dq.to(q.dtype)


class _Part(NamedTuple):
    keys: slice
    causal: bool


def _parts(block: Block, call: Call) -> tuple[slice, list[_Part]]:
    """The query rows that see a key, and the keys in pieces that are seen entirely or under a square causal mask."""
    n, m = block.q[1] - block.q[0], block.k[1] - block.k[0]
    causal = call.right == 0
    if call.left >= 0 or call.right > 0:
        raise NotImplementedError(f"backend 'xpu' has no window, got ({call.left}, {call.right})")
    seen = min(n, m) if causal or not m else n
    rows = slice(block.q[1] - call.q[0] - seen, block.q[1] - call.q[0])
    start, stop = block.k[0] - call.k[0], block.k[1] - call.k[0]
    if not seen:
        return rows, []
    if not causal:
        return rows, [_Part(slice(start, stop), False)]
    full = [_Part(slice(start, stop - seen), False)] if m > seen else []
    return rows, [*full, _Part(slice(stop - seen, stop), True)]


def _kernels() -> tuple[Callable[..., Any], Callable[..., Any]]:
    return getattr(torch.ops.aten, _OPERATOR), getattr(torch.ops.aten, f"{_OPERATOR}_backward")
