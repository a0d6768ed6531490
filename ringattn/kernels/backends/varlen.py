"""What variable-length kernels of the FlashAttention family are given for a call, each in the form that it takes.

FlashAttention 3 and 4 read keys where they lie, with rows between those of one block and of the next; FlashAttention 2
and torch's copy of it know cumulative lengths only, so their keys are laid end to end first. Shapes are those of
`ringattn.kernels.spec`, B the number of blocks.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ringattn.kept import kept, kept_already
from ringattn.kernels.spec import Call, Grads, Options

T = TypeVar("T")

INF = float("inf")


def kept_with_call(make: Callable[[Call, Options, torch.device], T]) -> Callable[[Call, Options, torch.device], T]:
    """A function that keeps what `make` returns with the call, for each device, scale and cap; nobody may change it.

    The layers of a step ask for the same arguments, and each asks twice: building them again is host time.
    """
    name = f"{make.__module__}.{make.__name__}"  # and not the function, with which a call could not be pickled

    @wraps(make)
    def found(call: Call, options: Options, device: torch.device) -> T:
        key = name, device, options.scale, options.softcap
        already: T | None = kept_already(call, key)
        return kept(call, key, lambda: make(call, options, device)) if already is None else already

    return found


class Varlen(NamedTuple):
    """Lengths and band of a call on one device."""

    cu_q: Tensor  # (B + 1,) int32: cumulative query lengths
    cu_k: Tensor  # (B + 1,) int32: first key row of each block, and the end
    used_k: Tensor | None  # (B,) int32: keys of each block; None: all to where the next begins
    max_q: int
    max_k: int
    causal: bool
    left: int  # -1 is open
    right: int

    @classmethod
    def in_place(cls, call: Call, device: torch.device) -> "Varlen":
        """For a kernel that skips rows between the keys of blocks. Its causal mode has no window beside it."""
        lengths = call.tensors(device)
        cu_k, used_k = (lengths.cu_k, None) if call.dense_keys else (lengths.k_offsets, lengths.k_lens)
        causal = call.right == 0 and call.left < 0
        return cls(lengths.cu_q, cu_k, used_k, call.max_q, call.max_k, causal, call.left, call.right)

    @classmethod
    def end_to_end(cls, call: Call, device: torch.device) -> "Varlen":
        """For a kernel that gets the result of `pack_keys`, and whose causal mode only closes the right side."""
        lengths = call.tensors(device)
        longest, causal = longest_keys(call), call.right == 0
        return cls(lengths.cu_q, lengths.cu_k, None, call.max_q, longest, causal, call.left, call.right)

    def named(self, options: Options) -> dict[str, Any]:
        """As arguments, under the names that the packages of FlashAttention share; `used_k` has no common one."""
        return {
            "cu_seqlens_q": self.cu_q,
            "cu_seqlens_k": self.cu_k,
            "max_seqlen_q": self.max_q,
            "max_seqlen_k": self.max_k,
            "softmax_scale": options.scale,
            "softcap": options.softcap,
            "causal": self.causal,
            "window_size_left": self.left,
            "window_size_right": self.right,
        }


def longest_keys(call: Call) -> int:
    """An upper bound of the key lengths, and of what an open side of a window must reach.

    FlashAttention 2 takes a window of this or more for an open one, and an open side beside a closed one for this many
    keys: with the longest key length itself both are wrong where a block has more queries than keys.
    """
    return max(call.max_k, call.max_q, call.right + 1)


def pack_keys(call: Call, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values laid end to end, for a kernel that knows cumulative lengths only; no copy where they are so."""
    if call.dense_keys:
        return k, v
    rows = call.packed_key_rows(k.device)
    return k.index_select(0, rows), v.index_select(0, rows)


def unpack_keys(call: Call, grads: Grads, dk: Tensor, dv: Tensor) -> None:
    """Gradients of `pack_keys`' result, back in their places."""
    if call.dense_keys:
        grads.dk.copy_(dk)
        grads.dv.copy_(dv)
        return
    rows = call.packed_key_rows(dk.device)
    grads.dk.index_copy_(0, rows, dk)
    grads.dv.index_copy_(0, rows, dv)


def minus_infinity_of_keyless(lse: Tensor) -> Tensor:
    """The lse of a FlashAttention 2 kernel, which is +inf for rows without keys, as the contract has it: -inf."""
    return torch.where(lse == INF, -INF, lse)


def infinity_of_keyless(lse: Tensor, call: Call) -> Tensor:
    """lse for a backward kernel: +inf for rows without keys, so that exp(score - lse) is 0 and not NaN.

    Rows that have keys in this call have a finite one already: where all have, two launches are saved.
    """
    if not call.keyless_rows:
        return lse.contiguous()
    return lse.masked_fill(lse == -INF, INF).contiguous()
