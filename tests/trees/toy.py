"""A small transformer in float64 with a dense mask: what sequences alone say is what trees must say."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from ringattn.trees import Trees

WORDS, SIZE, LONGEST = 7, 8, 16


class Toy(nn.Module):
    """Two layers of one attention head and an MLP; positions are learned."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.positions = nn.Embedding(WORDS, SIZE), nn.Embedding(LONGEST, SIZE)
        self.qkv = nn.ModuleList(nn.Linear(SIZE, 3 * SIZE) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(SIZE, WORDS)
        self.double()

    def forward(self, ids: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
        """Hidden states (T, E) of ids (T,); allowed (T, T) says which keys a query sees."""
        x = self.embedding(ids) + self.positions(positions)
        for qkv, mlp in zip(self.qkv, self.mlp, strict=True):
            q, k, v = qkv(x).chunk(3, -1)
            x = x + (q @ k.T).masked_fill(~allowed, -torch.inf).softmax(-1) @ v
            x = x + mlp(x)
        return x


def dense(lengths: Sequence[int], parents: Sequence[int]) -> Tensor:
    """(T, T) booleans, from the words alone: a segment sees its ancestors whole and itself causally."""
    total = sum(lengths)
    allowed = torch.zeros(total, total, dtype=torch.bool)
    firsts = [sum(lengths[:number]) for number in range(len(lengths))]
    for number, (first, size) in enumerate(zip(firsts, lengths, strict=True)):
        rows = slice(first, first + size)
        allowed[rows, rows] = torch.ones(size, size).tril().bool()
        above = parents[number]
        while above >= 0:
            allowed[rows, firsts[above] : firsts[above] + lengths[above]] = True
            above = parents[above]
    return allowed


def hidden_of(model: Toy, trees: Trees) -> Tensor:
    return model(trees.tokens, trees.positions, dense(trees.lengths, trees.parents))


def log_probs_alone(model: Toy, sequence: Sequence[int]) -> Tensor:
    """(n - 1,) of each token after the first."""
    ids = torch.as_tensor(list(sequence), dtype=torch.int64)
    if len(ids) < 2:
        return torch.zeros(0, dtype=torch.float64)
    hidden = model(ids, torch.arange(len(ids)), torch.ones(len(ids), len(ids)).tril().bool())
    return F.log_softmax(model.head(hidden), -1)[:-1].gather(1, ids[1:, None])[:, 0]


def loss_alone(model: Toy, sequences: Sequence[Sequence[int]], weights: Sequence[Any]) -> Tensor:
    """The weighted sum over sequences, each by itself."""
    total = torch.zeros((), dtype=torch.float64)
    for sequence, weight in zip(sequences, weights, strict=True):
        own = torch.as_tensor(weight, dtype=torch.float64).expand(len(sequence))
        total = total - (own[1:] * log_probs_alone(model, sequence)).sum()
    return total


@st.composite
def families(draw: st.DrawFn, most: int = 7) -> list[list[int]]:
    """Sequences that share prefixes: each new one goes on from somewhere in one that is there, or is itself one."""
    sequences: list[list[int]] = []
    for _ in range(draw(st.integers(0, most))):
        known = draw(st.sampled_from(sequences)) if sequences else []
        cut = draw(st.integers(0, len(known)))
        rest = draw(st.lists(st.integers(0, WORDS - 1), max_size=4))
        sequences.append((known[:cut] + rest)[:LONGEST])
    return sequences


weights = st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-3, 3, allow_subnormal=False))


@st.composite
def weighted(draw: st.DrawFn, most: int = 7) -> tuple[list[list[int]], list[Any]]:
    """Sequences, and for each a number or one for every token."""
    sequences = draw(families(most))
    each = [draw(st.one_of(weights, st.lists(weights, min_size=len(one), max_size=len(one)))) for one in sequences]
    return sequences, each
