"""The judge: attention in plain torch, any dtype, one block after another. Exact rather than fast."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ringattn.kernels.merge import finite_lse
from ringattn.kernels.spec import Block, Call, Capability, Dropout, Grads, Options, Range, SavedCall, accumulation_dtype

SCORE_ELEMENTS = 1 << 24  # scores held at a time: long blocks are walked in runs of query rows


class Reference:
    name = "reference"
    capability = Capability(softcap=True, dropout=True, unequal_head_dims=True, deterministic=True, adds=True)

    def missing(self) -> str | None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, options: Options, out: Tensor) -> Tensor:
        lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=accumulation_dtype(q.dtype))
        for rows, keys, allowed in _score_tiles(call, q):
            scores = _masked_scores(q[rows], k[keys], allowed, options)
            lse[:, rows] = torch.logsumexp(scores, dim=-1)
            weights = torch.exp(scores - finite_lse(lse[:, rows])[..., None])
            out[rows] = _weighted_values(_with_dropout(weights, options.dropout, rows, keys), v[keys]).to(out.dtype)
        for rows in _keyless(call):
            out[rows] = 0
        return lse

    def backward(self, dout: Tensor, saved: SavedCall, grads: Grads) -> None:
        q, k, v, out, lse, call, options = saved
        dtype = accumulation_dtype(q.dtype)
        dk, dv = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
        group = q.shape[1] // k.shape[1]
        delta = (dout.to(dtype) * out.to(dtype)).sum(-1).T  # (H, T)
        for rows, keys, allowed in _score_tiles(call, q):
            scores = _masked_scores(q[rows], k[keys], allowed, options)
            weights = torch.exp(scores - finite_lse(lse[:, rows])[..., None])
            gain = torch.einsum("qhv,khv->hqk", dout[rows].to(dtype), _per_query_head(v[keys], group))
            gain = _with_dropout(gain, options.dropout, rows, keys)
            dscores = weights * (gain - delta[:, rows, None])
            if options.softcap:
                dscores = dscores * torch.where(allowed, 1 - (scores / options.softcap) ** 2, 0.0)
            dscores = dscores * options.scale
            dq = torch.einsum("hqk,khd->qhd", dscores, _per_query_head(k[keys], group))
            grads.deliver(0, dq, (rows.start, rows.stop))
            dk[keys] += _per_key_head(torch.einsum("hqk,qhd->khd", dscores, q[rows].to(dtype)), group)
            weights = _with_dropout(weights, options.dropout, rows, keys)
            dv[keys] += _per_key_head(torch.einsum("hqk,qhv->khv", weights, dout[rows].to(dtype)), group)
        for rows in _keyless(call):
            grads.deliver(0, torch.zeros_like(q[rows]), (rows.start, rows.stop))
        for start, stop in call.key_runs:
            span = start - call.k[0], stop - call.k[0]
            grads.deliver(1, dk[slice(*span)], span)
            grads.deliver(2, dv[slice(*span)], span)


def allowed_pairs(block: Block, left: int, right: int, rows: Range, device: torch.device) -> Tensor:
    """The (rows, m) boolean band of a block for its queries `[rows)`, counted inside the block."""
    n, m = block.lengths
    diagonal = torch.arange(*rows, device=device)[:, None] + (m - n)
    keys = torch.arange(m, device=device)[None, :]
    allowed = torch.ones(rows[1] - rows[0], m, dtype=torch.bool, device=device)
    if left >= 0:
        allowed &= keys >= diagonal - left
    if right >= 0:
        allowed &= keys <= diagonal + right
    return allowed


def _score_tiles(call: Call, q: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Query rows, key rows and their band, in pieces whose scores fit `SCORE_ELEMENTS`."""
    for block in call.blocks:
        n, m = block.lengths
        if not n or not m:
            continue
        step = max(1, SCORE_ELEMENTS // (m * q.shape[1]))
        keys, base = call.keys_of(block), call.rows_of(block).start
        for start in range(0, n, step):
            stop = min(n, start + step)
            yield (
                slice(base + start, base + stop),
                keys,
                allowed_pairs(block, call.left, call.right, (start, stop), q.device),
            )


def _keyless(call: Call) -> list[slice]:
    """Rows of blocks without keys. Other rows that see none have weights of 0 by their lse, and need nothing here."""
    return [call.rows_of(block) for block in call.blocks if block.k[0] == block.k[1]]


def _masked_scores(q: Tensor, k: Tensor, allowed: Tensor, options: Options) -> Tensor:
    """(n, H, D), (m, K, D) -> (H, n, m), -inf outside the band."""
    dtype = accumulation_dtype(q.dtype)
    scores = torch.einsum("qhd,khd->hqk", q.to(dtype), _per_query_head(k, q.shape[1] // k.shape[1])) * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    return scores.masked_fill(~allowed, float("-inf"))


def _with_dropout(x: Tensor, dropout: Dropout | None, rows: slice, keys: slice) -> Tensor:
    """(H, n, m) with the dropped elements 0 and the others divided by 1 - p."""
    if dropout is None:
        return x
    kept = kept_pairs(dropout.seed, dropout.p, dropout.q_index[rows], dropout.k_index[keys], dropout.first_head, len(x))
    return torch.where(kept, x / (1 - dropout.p), 0.0)


def kept_pairs(seed: int, p: float, q_index: Tensor, k_index: Tensor, first_head: int, heads: int) -> Tensor:
    """(H, n, m) booleans, true with probability 1 - p: a hash of seed, head and the global indices of query and key.

    The mixing function is that of splitmix64 (Steele, Lea, Flood 2014), twice.
    """
    return is_kept(row_hashes(seed, q_index, first_head, heads)[..., None] + k_index, p)


def row_hashes(seed: int, q_index: Tensor, first_head: int, heads: int) -> Tensor:
    """(H, n) int64: what `is_kept` needs of seed, head and query; the global index of a key is added to it."""
    head = torch.arange(first_head, first_head + heads, device=q_index.device)
    return _mixed_bits(q_index[None, :] + (head[:, None] << 40) + seed * 0x5851F42D4C957F2D % 2**63)


def is_kept(pair: Tensor, p: float) -> Tensor:
    """Whether the pairs of a row's hash plus a key's global index are kept; elementwise, for kernels too."""
    return (_mixed_bits(pair) >> 11 & 2**53 - 1) >= math.ceil(p * 2**53)


def _mixed_bits(x: Tensor) -> Tensor:
    """splitmix64's permutation of 64-bit integers, in int64, whose arithmetic wraps around.

    A right shift of int64 copies the sign: the bits that come in are masked away.
    """
    x = x + (0x9E3779B97F4A7C15 - 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return x ^ (x >> 31 & (1 << 33) - 1)


def _weighted_values(weights: Tensor, v: Tensor) -> Tensor:
    """(H, n, m), (m, K, V) -> (n, H, V)"""
    return torch.einsum("hqk,khv->qhv", weights, _per_query_head(v, weights.shape[0] // v.shape[1]))


def _per_query_head(x: Tensor, group: int) -> Tensor:
    """(m, K, D) -> (m, H, D) in accumulation precision: a key head for each of the query heads that share it."""
    return x.to(accumulation_dtype(x.dtype)).repeat_interleave(group, dim=1)


def _per_key_head(x: Tensor, group: int) -> Tensor:
    """Sum over the query heads of each key head: (m, H, D) -> (m, K, D)."""
    return x.unflatten(1, (-1, group)).sum(2)
