"""Packs whose common prefixes are computed once hold the documents and the targets that they held before."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn import MeshShape
from ringattn.training.data.corpus import Corpus, corpus_of
from ringattn.training.packs import sharing
from ringattn.training.packs.batches import batches
from ringattn.training.packs.packing import NO_TARGET, Packer, counted, read_pack
from ringattn.training.packs.placing import placed
from ringattn.trees import Targets
from tests.trees.toy import families


def masked(documents: list[list[int]], seed: int) -> Corpus:
    """A corpus of which about half is learned."""
    corpus = corpus_of([np.array(one, np.uint8) for one in documents], 256)
    mask = np.random.default_rng(seed).integers(0, 2, corpus.total, dtype=np.uint8)
    return Corpus(corpus.tokens, corpus.offsets, 256, corpus.fingerprint, mask if seed % 2 else None)


def histories(
    ids: list[int], labels: list[tuple[int, int, float]], above: list[list[int]]
) -> dict[tuple[int, ...], float]:
    """Weight of every target by all that it is predicted from."""
    out: dict[tuple[int, ...], float] = {}
    for row, label, weight in labels:
        key = (*(ids[at] for at in above[row]), label)
        out[key] = out.get(key, 0.0) + weight
    return {key: value for key, value in out.items() if value}


@settings(max_examples=60, deadline=None)
@given(
    documents=families(9).filter(lambda found: any(found)),
    seq_len=st.integers(1, 30),
    pad=st.booleans(),
    seed=st.integers(0, 3),
    least=st.integers(1, 3),
)
def test_the_same_targets_after_the_same_tokens(documents, seq_len, pad, seed, least):
    corpus = masked(documents, seed)
    packer = Packer(corpus, seq_len, seed, pad)
    for _ in range(3):
        plan = counted(packer.next(), corpus)
        plain = read_pack(plan, corpus)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sharing, "MIN_SHARED", least)
            shared = sharing.read_shared(plan, corpus)
            assert sharing.tokens_saved(plan, corpus) == plan.tokens - len(shared.tokens)
        assert shared.targets == plain.targets == shared.labels.items
        assert len(shared.tokens) == shared.docs.total <= plan.tokens
        begins = [start for start, size in zip(plain.docs.starts, plain.docs.lengths, strict=True) for _ in range(size)]
        above = [list(range(begin, row + 1)) for row, begin in enumerate(begins)]
        known = [(row, int(label), 1.0) for row, label in enumerate(plain.labels) if label != NO_TARGET]
        wanted = histories(plain.tokens.tolist(), known, above)
        from ringattn import Mask

        sees = shared.docs.dense(Mask())
        triples = list(
            zip(*(x.tolist() for x in (shared.labels.rows, shared.labels.labels, shared.labels.weights)), strict=True)
        )
        assert histories(shared.tokens.tolist(), triples, [one.nonzero()[:, 0].tolist() for one in sees]) == wanted


def test_short_beginnings_are_not_shared():
    long, short = list(range(40)), list(range(50, 60))
    documents = [[*long, 1], [*long, 2], [*short, 3], [*short, 4]]
    corpus = corpus_of([np.array(one, np.uint8) for one in documents], 256)
    plan = Packer(corpus, corpus.total, 0).next()
    shared = sharing.read(counted(plan, corpus), corpus)
    assert len(shared.tokens) == corpus.total  # the plan does not ask for it
    (batch,) = (
        one
        for one, _ in zip(batches(Packer(corpus, corpus.total, 0), 1, 0, 1, lambda one: one, True), "1", strict=False)
    )
    assert isinstance(batch.micro[0].labels, Targets)
    assert len(batch.micro[0].tokens) == corpus.total - 40
    assert batch.targets == batch.micro[0].targets == corpus.total - 4
    assert batch.tokens == corpus.total
    assert sorted(batch.micro[0].docs.lengths) == [11, 11, 42]


def test_every_rank_has_its_part():
    documents = [[*range(40), *range(n, n + 9)] for n in range(5)]
    corpus = corpus_of([np.array(one, np.uint8) for one in documents], 256)
    plan = counted(Packer(corpus, corpus.total - 3, 1).next(), corpus)
    shared = sharing.read_shared(plan, corpus)
    parts = [placed(shared, MeshShape(ring=2), "auto", None)]
    local = parts[0]
    assert isinstance(local.targets, Targets)
    assert local.known is local.targets
    assert local.labels.shape == local.ids.shape == local.positions.shape
    assert torch.equal(local.ids, local.layout.shard(shared.tokens))
    assert local.count == len(local.targets)
    assert local.targets.tokens == len(local.ids)
