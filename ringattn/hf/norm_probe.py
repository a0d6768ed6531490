"""What a norm of hidden states keeps, found by running it on the meta device, without weights."""

import torch
from torch import nn
from torch.func import functional_call

from ringattn.hf.held_storages import kept_tensors, state_in
from ringattn.memory.planning.parts import PLAIN_NORM, NormKind

ROWS = 64


def norm_kind(norm: nn.Module | None, width: int) -> NormKind:
    """Of a norm of so many elements; without one, or for one that does not run, that of Llama."""
    if norm is None:
        return PLAIN_NORM
    x = torch.empty(1, ROWS, width, dtype=torch.bfloat16, device="meta", requires_grad=True) * 1
    try:
        with kept_tensors() as kept:
            functional_call(norm, state_in(norm, torch.bfloat16), x)
    except Exception:  # whatever a family's own code raises there
        return PLAIN_NORM
    whole = {one.untyped_storage()._cdata: one.dtype for one in kept if one.numel() == x.numel()}
    itself = whole.pop(x.untyped_storage()._cdata, None) is not None
    wide = sum(dtype == torch.float32 for dtype in whole.values())
    return NormKind(kernel=itself and not whole, wide=wide > 1 and wide == len(whole), centred=wide > 2)
