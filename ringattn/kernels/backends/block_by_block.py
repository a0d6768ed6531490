"""Attention of a call whose kernel takes one block at a time: queries that see all of some keys, or a square corner.

Operators of torch for scaled dot products are such kernels. A causal block with more keys than queries is split into
the keys that every query sees and a square causal part: in which corner an operator aligns a block that is not square
differs between operators and versions. Shapes are those of `ringattn.kernels.spec`; n queries and m keys of a block.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.kernels.backends.rows import as_batch, from_batch
from ringattn.kernels.merge import merge_
from ringattn.kernels.spec import Block, Call, Grads, Options, SavedCall, accumulation_dtype

Inputs = list[Tensor]  # (1, H, n, D) of queries, (1, K, m, D) of keys, ... in the order of the operator


class Part(NamedTuple):
    """Keys of a block that an operator can take in one go."""

    keys: slice  # of the call's k and v
    causal: bool = False
    mask: Tensor | None = None  # additive, (n, m)


class BlockByBlock(ABC):
    """The two passes of a backend; its kernel is what a subclass adds.

    Rows without keys are never given to the kernel, nor empty tensors, for which some operators end the process.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, options: Options, out: Tensor) -> Tensor:
        lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=accumulation_dtype(q.dtype))
        for block in call.blocks:
            keyless, rows = _split_rows(call, block)
            out[keyless] = 0
            if rows.start == rows.stop:
                continue
            results = []
            for part in self._parts(call, block, q):
                inputs = as_batch(q[rows], k[part.keys], v[part.keys])
                part_out, part_lse = self._attend(inputs, part, options.scale)
                results.append((from_batch(part_out), part_lse[0]))
            out[rows], lse[:, rows] = results[0] if len(results) == 1 else _merged(results, q[rows], v.shape[2])
        return lse

    def backward(self, dout: Tensor, saved: SavedCall, grads: Grads) -> None:
        q, k, v, out, lse, call, options = saved
        for block in call.blocks:
            keyless, rows = _split_rows(call, block)
            grads.dq[keyless] = 0
            if rows.start == rows.stop:
                _clear_keys(grads, call.keys_of(block))
                continue
            dq = torch.zeros_like(q[rows], dtype=accumulation_dtype(q.dtype))
            for part in self._parts(call, block, q):
                inputs = as_batch(dout[rows], q[rows], k[part.keys], v[part.keys], out[rows])
                found = self._differentiate(inputs, lse[None, :, rows].contiguous(), part, options.scale)
                dq_part, dk, dv = map(from_batch, found)
                dq += dq_part
                grads.dk[part.keys], grads.dv[part.keys] = dk, dv
            grads.dq[rows] = dq.to(q.dtype)

    @abstractmethod
    def _parts(self, call: Call, block: Block, like: Tensor) -> list[Part]:
        """The keys of a block, each once, for its queries that see some; masks are made for queries such as `like`."""

    @abstractmethod
    def _attend(self, inputs: Inputs, part: Part, scale: float) -> tuple[Tensor, Tensor]:
        """Of q, k, v: out (1, H, n, V) and lse (1, H, n)."""

    @abstractmethod
    def _differentiate(self, inputs: Inputs, lse: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Of dout, q, k, v, out, and lse (1, H, n) of the whole softmax: dq, dk, dv."""


def plain_parts(call: Call, block: Block) -> list[Part] | None:
    """A block's keys in parts that need no mask, for its queries that see some; None if its band needs one."""
    m = block.lengths[1]
    n = block.lengths[0] - call.keyless_of(block)
    keys = call.keys_of(block)
    open_left = call.left < 0 or call.left >= m - 1
    if open_left and (call.right < 0 or call.right >= n - 1):
        return [Part(keys)]
    if open_left and call.right == 0 and m >= n:
        corner = keys.stop - n
        full = [Part(slice(keys.start, corner))] if m > n else []
        return [*full, Part(slice(corner, keys.stop), causal=True)]
    return None


def _split_rows(call: Call, block: Block) -> tuple[slice, slice]:
    """A block's rows of q: the first, which see no key, and the others."""
    rows = call.rows_of(block)
    first = rows.start + call.keyless_of(block)
    return slice(rows.start, first), slice(first, rows.stop)


def _clear_keys(grads: Grads, keys: slice) -> None:
    grads.dk[keys] = 0
    grads.dv[keys] = 0


def _merged(results: list[tuple[Tensor, Tensor]], q: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    """Partial results (n, H, V), (H, n) of the same queries as one, in accumulation precision."""
    dtype = accumulation_dtype(q.dtype)
    out = q.new_zeros(q.shape[0], q.shape[1], value_dim, dtype=dtype)
    lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=dtype)
    for part_out, part_lse in results:
        merge_(out, lse, part_out, part_lse)
    return out, lse
