"""Floating point operations of a training step, and what the GPU could do: model FLOPs utilisation (MFU).

Counted as the PaLM paper does: 6 per parameter and token, plus the attention; recomputation does not count.
Attention is counted by the pairs that the mask allows in each document, so causal documents count half a square.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from ringattn.hf.heads import heads_by_layer
from ringattn.hf.shape import masks_by_layer
from ringattn.mask import Band, Mask


@dataclass(frozen=True)
class StepFlops:
    """Forward and backward FLOPs of a batch.

    Arguments:
        parameters: that multiply every token (all but the input embedding, unless it is also the output head).
        pairs: of each attention layer the mask, and forward FLOPs for one allowed (query, key) pair: 2 × heads × (dim
            of keys + dim of values).
        frozen: of the parameters, those that get no gradient: the backward pass has one product with them, not two.
    """

    parameters: int
    pairs: tuple[tuple[Mask, int], ...]
    frozen: int = 0

    @classmethod
    def of(cls, model: nn.Module, config: Any) -> "StepFlops":
        """Of an unsharded model with its transformers configuration."""
        text = config.get_text_config()
        parameters = sum(p.numel() for p in model.parameters())
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        if not text.tie_word_embeddings:
            parameters -= text.vocab_size * text.hidden_size
            frozen -= text.vocab_size * text.hidden_size * (not _embeds_trained(model))
        masks = masks_by_layer(text)
        if all(mask is None for mask in masks):  # then configurations may lack heads
            return cls(parameters, (), frozen)
        flops = [2 * heads.queries * (heads.dim + heads.value_dim) for heads in heads_by_layer(text)]
        pairs = tuple((mask, own) for mask, own in zip(masks, flops, strict=True) if mask is not None)
        return cls(parameters, pairs, frozen)

    def __call__(self, tokens: int, lengths: Sequence[int]) -> float:
        """FLOPs of `tokens` tokens in documents of these lengths; where all weights are trained the backward pass
        costs twice the forward pass."""
        documents = Counter(lengths)  # of a step with thousands of them, many have a length that others have
        return self.per_token * tokens + sum(count * self.attention(length) for length, count in documents.items())

    @property
    def per_token(self) -> float:
        """FLOPs of a token in everything but the attention."""
        return 6.0 * self.parameters - 2.0 * self.frozen

    def attention(self, length: int) -> float:
        """FLOPs of one document's attention, all layers."""
        return 3.0 * sum(flops * band.area(0, length, length) for band, flops in self._bands.items())

    @cached_property
    def _bands(self) -> Counter[Band]:
        """FLOPs for a pair, of all layers that have a band."""
        found = Counter[Band]()
        for mask, flops in self.pairs:
            found[mask.band] += flops
        return found


def _embeds_trained(model: Any) -> bool:
    return bool(model.get_input_embeddings().weight.requires_grad)
