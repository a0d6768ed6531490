"""Intel GPUs: torch's SYCL flash attention (`aten._scaled_dot_product_flash_attention` on XPU), block by block.

Tested against fakes only, never on a device. The kernel takes one block at a time, without window, softcap or dropout:
these are refused. Its causal corner differs between versions, so only square blocks are called causal: the keys before
the square are a second, full call. Kernels from a hub are not used: nothing is downloaded implicitly.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ringattn.kernels.backends.block_by_block import BlockByBlock, Inputs, Part, plain_parts
from ringattn.kernels.spec import Block, Call, Capability

_OPERATOR = "_scaled_dot_product_flash_attention"


class XpuFlash(BlockByBlock):
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

    def _parts(self, call: Call, block: Block, like: Tensor) -> list[Part]:
        if call.left >= 0 or call.right > 0:
            raise NotImplementedError(f"backend 'xpu' has no window, got ({call.left}, {call.right})")
        parts = plain_parts(call, block)
        assert parts is not None, "a causal or full block needs no mask"
        return parts

    def _attend(self, inputs: Inputs, part: Part, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _kernels()[0](*inputs, 0.0, part.causal, False, scale=scale)
        return out, lse

    def _differentiate(self, inputs: Inputs, lse: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys = inputs[1].shape[2], inputs[2].shape[2]
        no_rng = torch.zeros((), dtype=torch.int64, device=lse.device)
        return _kernels()[1](
            *inputs, lse, None, None, queries, keys, 0.0, part.causal, no_rng, no_rng, scale=scale
        )  # fmt: skip


def _kernels() -> tuple[Callable[..., Any], Callable[..., Any]]:
    return getattr(torch.ops.aten, _OPERATOR), getattr(torch.ops.aten, f"{_OPERATOR}_backward")
