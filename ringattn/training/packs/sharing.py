"""Packs whose documents share common prefixes: the same documents and targets, on fewer tokens."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ringattn.documents import Documents
from ringattn.training.packs.ordering import AnyCorpus
from ringattn.training.packs.packing import Pack, PackPlan, counted, learned_targets, read_pack
from ringattn.trees import Targets, Trees
from ringattn.trees.trie import grow

# Tokens. All conversations begin with the few marks of a template: to share those would make one tree of a whole pack,
# cut in many segments, and save nothing.
MIN_SHARED = 32


@dataclass(frozen=True)
class SharedPack:
    """A pack with its tokens, common prefixes of its documents once.

    Arguments:
        tokens: (T,) int64, at most `seq_len` of them, and no padding.
        labels: triples of the T tokens; a target counts as often as there are documents with it.
        docs: the trees of the pack.
        targets: number of targets, each of every document.
    """

    tokens: Tensor
    labels: Targets
    docs: Documents
    targets: int


AnyPack = Pack | SharedPack


def read(plan: PackPlan, corpus: AnyCorpus) -> AnyPack:
    """Reads a planned pack, with or without common prefixes, as the plan says."""
    return read_shared(plan, corpus) if plan.shared else read_pack(plan, corpus)


def tokens_saved(plan: PackPlan, corpus: AnyCorpus) -> int:
    """By how many tokens `read_shared` makes a planned pack shorter."""
    sequences = [corpus.read(segment.document, segment.start, segment.stop) for segment in plan.segments]
    runs = grow(sequences, MIN_SHARED).segments
    return sum(map(len, sequences)) - sum(run.stop - run.start for run in runs)


def read_shared(plan: PackPlan, corpus: AnyCorpus) -> SharedPack:
    """The documents of `read_pack`, and all their targets, as trees."""
    plan = counted(plan, corpus)
    sequences, weights, following = [], [], []
    for number, segment in enumerate(plan.segments):
        size = segment.stop - segment.start
        known = corpus.read(segment.document, segment.start, segment.stop + (not segment.ends))
        learned = learned_targets(segment, corpus)
        times = np.ones(len(known) - 1) if learned is None else learned.astype(np.float64)
        sequences.append(known[:size])
        weights.append(np.concatenate([[0.0], times[: size - 1]]))
        if not segment.ends:  # the end of the pack cuts the document: what comes next is a target, and no token
            following.append((number, int(known[size]), float(times[-1])))
    trees = Trees(sequences, weights, min_shared=MIN_SHARED)
    own = trees.targets
    rows = torch.tensor([int(trees.rows(number)[-1]) for number, _, _ in following], dtype=torch.int64)
    labels = Targets(
        torch.cat([own.rows, rows]),
        torch.cat([own.labels, torch.tensor([label for _, label, _ in following], dtype=torch.int64)]),
        torch.cat([own.weights, torch.tensor([times for _, _, times in following], dtype=torch.float64)]),
        own.tokens,
    )
    return SharedPack(trees.tokens, labels, trees.docs, plan.targets)
