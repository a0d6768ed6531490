"""Merging partial attention results by their log-sum-exp, and the attention sink as a last merge.

Sources: the blockwise softmax of FlashAttention (arXiv 2205.14135), across devices Ring Attention (arXiv 2310.01889).
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def merge_(acc: Tensor, acc_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge a partial result into an accumulator, in place: one fused kernel on GPUs with Triton, else plain torch.

    Arguments:
        acc: (n, H, V) in accumulation precision, and acc_lse: (H, n); 0 and -inf where nothing was merged yet.
        out: (n, H, V) of any precision, and lse: (H, n); 0 and -inf for rows without keys.
    """
    merge_into(acc, acc_lse, out, lse, acc)


def merge_into(acc: Tensor, acc_lse: Tensor, out: Tensor, lse: Tensor, target: Tensor) -> None:
    """`merge_` as the last step of several: the result goes to `target` (n, H, V), rounded to its dtype.

    `target` may be `acc` or `out`; otherwise `acc` may hold anything afterwards. `acc_lse` is updated as ever.
    """
    fits = all(map(_fits, (acc, out, target))) and acc.dtype == acc_lse.dtype == torch.float32
    fused = _fused() if fits else None
    if fused is not None:
        fused(acc, acc_lse, out, lse, target)
        return
    plain_merge_(acc, acc_lse, out, lse)
    if target is not acc:
        target.copy_(acc)


def plain_merge_(acc: Tensor, acc_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """`merge_` in plain torch, for every dtype and device: what the fused kernel must compute."""
    total = torch.logaddexp(acc_lse, lse)
    finite = finite_lse(total)
    acc.mul_(_per_row(torch.exp(acc_lse - finite)))
    acc.addcmul_(out.to(acc.dtype), _per_row(torch.exp(lse - finite)))
    acc_lse.copy_(total)


@cache
def _fused() -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None] | None:
    """The Triton kernel, or None without Triton, which is imported only when GPU tensors are merged."""
    try:
        from ringattn.kernels import merge_triton
    except ImportError:
        return None
    return merge_triton.merge_into


def _fits(x: Tensor) -> bool:
    return x.is_cuda and x.stride(-1) == 1 and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def apply_sinks_(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Add one logit per head to every row's softmax denominator, in place: out (n, H, V), lse (H, n), sinks (H,).

    Applied once, after the last merge, so that the number of partial results cannot count the sink twice.
    """
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    out.copy_(out.to(lse.dtype) * _per_row(torch.exp(lse - finite_lse(total))))
    lse.copy_(total)


def sinks_grad(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Gradient of the sinks (H,), from the final out and lse that include them.

    The sink is a key whose value is 0: its probability p = exp(sink - lse) has the gradient -p (dout · out).
    """
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).T
    return -(torch.exp(sinks.to(lse.dtype)[:, None] - finite_lse(lse)) * delta).sum(-1).to(sinks.dtype)


def finite_lse(lse: Tensor) -> Tensor:
    """lse with 0 for -inf, of rows without keys and sink: their weights become exp(-inf - 0) = 0 and not NaN."""
    return torch.where(torch.isinf(lse), 0.0, lse)


def _per_row(weights: Tensor) -> Tensor:
    """(H, n) -> (n, H, 1)"""
    return weights.T.unsqueeze(-1)
