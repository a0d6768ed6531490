"""Sequences with common prefixes as trees of tokens: what they share is computed once.

n tokens of a sequence, T tokens of the stream of trees, m targets.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringattn.documents import Documents
from ringattn.parallel.layout import Layout
from ringattn.trees.targets import Targets, numbers
from ringattn.trees.trie import Trie, grow, tokens_of


class Trees:
    """Token sequences in one stream without padding, every common prefix once: a tree for each first token.

    A token attends to those before it in its sequences, and every sequence is what it would be alone: its hidden
    states, its loss, and in the sum over sequences its gradients. Where sequences part, a row has a target for each
    token that follows. (Training on trees of tokens, in depth-first order and with summed weights, is described in Tree
    Training, arXiv 2511.00413.)

    Arguments:
        sequences: token ids >= 0 of each, (n,) integers in a list, array or tensor. They may be equal, prefixes of
            others, of one token, or empty.
        weights: for each sequence a number, the weight of all its targets; or (n,) numbers, each token's weight as a
            target, such as a mask of what is learned or an advantage. Nothing predicts a first token: its weight counts
            nowhere. Any finite number may be a weight, negative ones too; default: 1.
        min_shared: tokens that a common run has at least. Shorter ones are computed once for each continuation instead,
            which makes fewer and longer segments.

    A target that several sequences share is one, with the sum of their weights.

    Attributes:
        tokens: (T,) int64 on the host.
        lengths, parents: of segments, as `Documents.from_tree` takes them.
        targets: the m triples (row, label, weight) of the stream, by label in the stream's order.

    Raises ValueError naming the argument.
    """

    def __init__(self, sequences: Sequence[Any], weights: Sequence[Any] | None = None, *, min_shared: int = 1) -> None:
        if not isinstance(min_shared, int) or isinstance(min_shared, bool) or min_shared < 1:
            raise ValueError(f"min_shared must be a number of tokens >= 1, got {min_shared!r}")
        arrays = [tokens_of(one, f"sequences[{number}]") for number, one in enumerate(sequences)]
        each = _weights(weights, [len(one) for one in arrays])
        self._trie: Trie = grow(arrays, min_shared)
        segments = self._trie.segments
        self.lengths = tuple(one.stop - one.start for one in segments)
        self.parents = tuple(one.parent for one in segments)
        runs = [arrays[one.sequence][one.start : one.stop] for one in segments]
        self.tokens = torch.from_numpy(np.concatenate(runs) if runs else np.zeros(0, np.int64))
        self._sizes = tuple(len(one) for one in arrays)
        self.targets = self._targets(each)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._sizes)

    def __str__(self) -> str:
        total, kept = sum(self._sizes), len(self.tokens)
        trees = self.parents.count(-1)
        return f"{len(self)} sequences of {total} tokens in {trees} trees of {kept}, {len(self.lengths)} segments"

    @cached_property
    def docs(self) -> Documents:
        """The trees as documents of the stream."""
        return Documents.from_tree(self.lengths, self.parents)

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """Row of each segment's first token in the stream."""
        return tuple(accumulate(self.lengths, initial=0))[:-1]

    @cached_property
    def positions(self) -> Tensor:
        """(T,) int64, each token's place in its sequences."""
        parts = [np.arange(one.start, one.stop) for one in self._trie.segments]
        return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, np.int64))

    def rows(self, sequence: int) -> Tensor:
        """(n,) where the tokens of a sequence are in the stream."""
        size, segments = self._sizes[sequence], self._trie.segments
        parts = [
            np.arange(first := self.firsts[number], first + min(segments[number].stop, size) - segments[number].start)
            for number in self._trie.paths[sequence]
        ]
        return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, np.int64))

    def numbers(self, sequence: int) -> Tensor:
        """(n - 1,), or (0,) of no tokens: which targets are a sequence's own, from its second token on."""
        return self._number_of_row[self.rows(sequence)[1:]]

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """A value for every target, (m, ...), as those of each sequence: (n - 1, ...) from its second token on."""
        if values.shape[:1] != (len(self.targets),):
            raise ValueError(f"values must have one row for each of {len(self.targets)} targets, got {values.shape}")
        return tuple(values[self.numbers(one).to(values.device)] for one in range(len(self)))

    def by_sequence(self, x: Tensor, layout: Layout, grad: str = "same") -> tuple[Tensor, ...]:
        """Values of this rank's targets, such as log-probabilities, as those of each sequence. Collective over the
        sequence ranks.

        Arguments:
            x: (m of this rank,), in the order of `targets.shard(layout)`.
            grad: what the gradient of the result means, as for `Layout.unshard`.
        """
        return self.split(self.targets.unshard(x, layout, grad))

    @cached_property
    def _number_of_row(self) -> Tensor:
        """(T,) number of the target that a row is the label of; -1 for first tokens."""
        predicted = self._sources >= 0
        return torch.where(predicted, predicted.cumsum(0) - 1, -1)

    @cached_property
    def _sources(self) -> Tensor:
        """(T,) the row that predicts each row, -1 for first tokens."""
        rows = torch.arange(-1, len(self.tokens) - 1, device="cpu")
        for first, parent in zip(self.firsts, self.parents, strict=True):
            rows[first] = self.firsts[parent] + self.lengths[parent] - 1 if parent >= 0 else -1
        return rows

    def _targets(self, weights: Sequence[Tensor]) -> Targets:
        summed = torch.zeros(len(self.tokens), dtype=torch.float64, device="cpu")
        for sequence, own in enumerate(weights):
            summed[self.rows(sequence)] += own  # the rows of one sequence are different ones
        rows = (self._sources >= 0).nonzero()[:, 0]
        return Targets(self._sources[rows], self.tokens[rows], summed[rows], len(self.tokens))


def _weights(weights: Sequence[Any] | None, sizes: Sequence[int]) -> list[Tensor]:
    """(n,) float64 for each sequence."""
    if weights is None:
        weights = [1.0] * len(sizes)
    if len(weights) != len(sizes):
        raise ValueError(f"weights must have one entry for each of {len(sizes)} sequences, got {len(weights)}")
    out = []
    for number, (given, size) in enumerate(zip(weights, sizes, strict=True)):
        one = numbers(f"weights[{number}]", given)
        if one.dim() and one.shape != (size,):
            raise ValueError(
                f"weights[{number}] must be a number or one for each of the sequence's {size} tokens, got "
                f"{tuple(one.shape)}"
            )
        out.append(one.expand(size))
    return out
