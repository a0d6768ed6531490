"""The measured kernel as a transformers attention: what peers use, so that all rows have the same one.

T tokens of the stream, H query heads, K key heads, D head dim.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ringattn import Documents
from ringattn.kernels.spec import Backend, Block, Call, Grads, Options, SavedCall

NAME = "measured"
EXCHANGED = "measured_exchanged"  # the same; DeepSpeed's Ulysses takes its place


class PeerAttention:
    """A function for transformers' AttentionInterface, causal in each of the documents that are set.

    One object serves all models of a process: DeepSpeed's Ulysses keeps the function that it finds at first.
    """

    def __init__(self, kernel: Backend) -> None:
        self.kernel = kernel
        self.call: Call | None = None

    def of(self, docs: Documents) -> None:
        """Attention is of a stream of these documents from now on."""
        edges = [*docs.starts, docs.total]
        blocks = tuple(Block(rows, rows, -1, 0) for rows in pairwise(edges) if rows[0] < rows[1])
        self.call = Call(blocks, left=-1, right=0)

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """(1, H, T, D), (1, K, T, D), (1, K, T, D) -> (1, T, H, D)."""
        if query.shape[0] != 1 or attention_mask is not None or self.call is None:
            raise ValueError(f"expected one stream without a mask, got {tuple(query.shape)} and {attention_mask}")
        options = Options(kwargs.get("scaling") or query.shape[-1] ** -0.5)
        rows = (x[0].transpose(0, 1) for x in (query, key, value))
        return _KernelAlone.apply(*rows, self.kernel, self.call, options)[None], None

    @contextmanager
    def registered(self) -> Iterator[None]:
        """It under both names in transformers while this lasts."""
        from transformers import AttentionInterface, AttentionMaskInterface

        for name in (NAME, EXCHANGED):
            AttentionInterface.register(name, self)
            AttentionMaskInterface.register(name, no_mask)
        try:
            yield
        finally:
            for name in (NAME, EXCHANGED):
                AttentionInterface._global_mapping.pop(name, None)
                AttentionMaskInterface._global_mapping.pop(name, None)


def no_mask(*args: Any, **kwargs: Any) -> None:
    """Documents say who attends to whom."""


class _KernelAlone(torch.autograd.Function):
    """q (T, H, D), k and v (T, K, D) -> (T, H, D), keeping what every flash attention keeps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: Backend, call: Call, options: Options) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        lse = kernel.forward(q, k, v, call, options, out)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.kernel, ctx.call, ctx.options = kernel, call, options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        found = Grads(*(x.new_empty(x.shape) for x in (q, k, v)))
        ctx.kernel.backward(grads[0], SavedCall(q, k, v, out, lse, ctx.call, ctx.options), found)
        return *found.tensors, None, None, None
