"""torch's CPU flash attention: the same plans as on GPUs, on any laptop.

The operator takes one square causal or one full block, or an additive mask; blocks are walked one by one, which is also
faster than one masked call.
"""

from typing import Any

import torch
from torch import Tensor

from ringattn.kernels.backends.block_by_block import BlockByBlock, Inputs, Part, plain_parts
from ringattn.kernels.backends.reference import allowed_pairs
from ringattn.kernels.spec import Block, Call, Capability

_OPERATOR = "_scaled_dot_product_flash_attention_for_cpu"


class CpuFlash(BlockByBlock):
    name = "cpu"
    capability = Capability(devices=("cpu",), deterministic=True)

    def missing(self) -> str | None:
        return None if hasattr(torch.ops.aten, _OPERATOR) else f"torch {torch.__version__} has no {_OPERATOR}"

    def _parts(self, call: Call, block: Block, like: Tensor) -> list[Part]:
        parts = plain_parts(call, block)
        if parts is not None:
            return parts
        n, m = block.lengths
        rows = call.keyless_of(block), n
        allowed = allowed_pairs(block, call.left, call.right, rows, like.device)
        mask = torch.zeros(rows[1] - rows[0], m, dtype=like.dtype, device=like.device)
        return [Part(call.keys_of(block), mask=mask.masked_fill(~allowed, float("-inf")))]

    def _attend(self, inputs: Inputs, part: Part, scale: float) -> tuple[Tensor, Tensor]:
        return _forward(*inputs, 0.0, part.causal, attn_mask=part.mask, scale=scale)

    def _differentiate(self, inputs: Inputs, lse: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        return _backward(*inputs, lse, 0.0, part.causal, attn_mask=part.mask, scale=scale)


# Looked up at each call: a torch without the operators must still be able to import this module.
def _forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return getattr(torch.ops.aten, _OPERATOR)(*args, **kwargs)


def _backward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return getattr(torch.ops.aten, _OPERATOR + "_backward")(*args, **kwargs)
