"""Queries, keys and values of two short documents on one device, and attention over them by a dense softmax."""

import math

import torch
from torch import Tensor

from ringattn import Documents, Layout, Mask, MeshShape

DOCS = Documents([12, 8])
LAYOUT = Layout(DOCS, MeshShape())
CAUSAL = DOCS.dense(Mask())


def tensors(
    dims: tuple[int, int] = (8, 8), tokens: int = 20, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """q (T, 4, D), k (T, 2, D), v (T, 2, V), the same numbers whatever their dtype."""
    D, V = dims
    generator = torch.Generator().manual_seed(0)
    shapes = (tokens, 4, D), (tokens, 2, D), (tokens, 2, V)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v


def dense(
    allowed: Tensor, scale: float = 8**-0.5, softcap: float = 0.0, dims: tuple[int, int] = (8, 8)
) -> tuple[Tensor, Tensor]:
    """Attention of `tensors` over the allowed pairs (T, T): out (T, H, V) and lse (H, T)."""
    q, k, v = tensors(dims, len(allowed))
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed, -math.inf)
    return torch.einsum("hqk,khv->qhv", scores.softmax(-1), v.repeat_interleave(2, 1)), scores.logsumexp(-1)
