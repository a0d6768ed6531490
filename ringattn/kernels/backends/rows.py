"""Rows as kernels want them: of heads laid end to end, and of the keys that a call reads."""

import torch

from ringattn.kernels.spec import Call, Grads


def rows_of_heads(x: torch.Tensor) -> torch.Tensor:
    """x, copied only if the numbers of a head are not side by side, which is all that most kernels need."""
    return x if x.stride(-1) == 1 else x.contiguous()


def pack_keys(call: Call, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values laid end to end, for a kernel that knows cumulative lengths only; no copy where they are so."""
    if call.dense_keys:
        return k, v
    rows = call.packed_key_rows(k.device)
    return k.index_select(0, rows), v.index_select(0, rows)


def unpack_keys(call: Call, grads: Grads, dk: torch.Tensor, dv: torch.Tensor) -> None:
    """Gradients of `pack_keys`' result, back in their places."""
    if call.dense_keys:
        grads.dk.copy_(dk)
        grads.dv.copy_(dv)
        return
    rows = call.packed_key_rows(dk.device)
    grads.dk.index_copy_(0, rows, dk)
    grads.dv.index_copy_(0, rows, dv)
