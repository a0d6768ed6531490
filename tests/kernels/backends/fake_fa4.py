"""What `backends.fa4_sums` relies on in flash-attn-4: accumulators in an order of their own, a last step."""

from typing import Any

import torch
from torch import Tensor

from ringattn.kernels.backends.reference import Reference
from ringattn.kernels.spec import Block, Call, Grads, Options, SavedCall

TILE, MULTIPLE, CLUSTER = 32, 32, 2


def places(padded: int) -> Tensor:
    """Place in the accumulator of each number of a tile: (TILE, padded)."""
    return torch.randperm(TILE * padded, generator=torch.Generator().manual_seed(padded)).view(TILE, padded)


def starts(cu: Tensor, cluster: int) -> list[int]:
    """First accumulator row of each sequence, and where the last may end."""
    step = TILE * cluster
    return [(begin + index * step) // step * step for index, begin in enumerate(cu.tolist())]


def _bwd_postprocess_convert(
    accum: Tensor,
    output: Tensor,
    scale: float,
    cu_seqlens: Tensor,
    seqused: Tensor | None,
    arch: int,
    dtype: Any,
    hdim: int,
    block_size: int,
    num_threads: int,
    *,
    cluster_size: int = 1,
    hdim_multiple_of: int = 32,
    fake_mode: bool,
) -> None:
    padded = -(-hdim // hdim_multiple_of) * hdim_multiple_of
    order = places(padded)[:, :hdim]
    ends = cu_seqlens[1:] if seqused is None else cu_seqlens[:-1] + seqused
    for begin, end, first in zip(cu_seqlens.tolist(), ends.tolist(), starts(cu_seqlens, cluster_size), strict=False):
        for row in range(begin, end):
            tile, inner = divmod(first + row - begin, block_size)
            at = tile * block_size * padded + order[inner]
            output[row] = (accum[:, at] * scale).to(output.dtype)


def _packed(x: Tensor, cu: Tensor, used: Tensor, cluster: int) -> Tensor:
    """(n, H, D) in the order of the accumulator, with noise where nothing is."""
    _, heads, dim = x.shape
    padded = -(-dim // MULTIPLE) * MULTIPLE
    begins = starts(cu, cluster)
    accum = torch.full((heads, (begins[-1] + TILE * cluster) * padded), 1e6)
    order = places(padded)[:, :dim]
    for begin, length, first in zip(cu.tolist(), used.tolist(), begins, strict=False):
        for row in range(begin, begin + length):
            tile, inner = divmod(first + row - begin, TILE)
            accum[:, tile * TILE * padded + order[inner]] = x[row]
    return accum


def _flash_attn_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor,
    softmax_scale: float,
) -> None:
    """Causal attention, exact but for the rounding of the last step."""
    used_q = cu_seqlens_q.diff()
    blocks = [
        Block((a, a + n), (c, c + m))
        for a, n, c, m in zip(
            *(x.tolist() for x in (cu_seqlens_q[:-1], used_q, cu_seqlens_k[:-1], seqused_k)), strict=True
        )
    ]
    grads = Grads(*(torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)))
    wide = (x.float() for x in (q, k, v, out))
    saved = SavedCall(*wide, lse, Call(tuple(blocks), -1, 0), Options(softmax_scale))
    Reference().backward(dout.float(), saved, grads)
    grouped = q.shape[1] > k.shape[1]
    for target, grad, cu, used, cluster in (
        (dq, grads.dq, cu_seqlens_q, used_q, 1),
        (dk, grads.dk, cu_seqlens_k, seqused_k, CLUSTER),
        (dv, grads.dv, cu_seqlens_k, seqused_k, CLUSTER),
    ):
        if target is not dq and not grouped:
            for begin, length in zip(cu.tolist(), used.tolist(), strict=False):
                target[begin : begin + length] = grad[begin : begin + length]
            continue
        scale = 1.0 if target is dv else softmax_scale
        _bwd_postprocess_convert(
            _packed(grad / scale, cu, used, cluster), target, scale, cu, None if target is dq else used,
            90, "bf16", target.shape[2], TILE, 128,
            cluster_size=cluster, hdim_multiple_of=MULTIPLE, fake_mode=False,
        )  # fmt: skip
