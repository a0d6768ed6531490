"""Packs: every token once, every target once, any replica count, any place to resume."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn.training.data.corpus import Corpus, corpus_of
from ringattn.training.packs.batches import Prefetcher, batches
from ringattn.training.packs.ordering import Position
from ringattn.training.packs.packing import NO_TARGET, Packer, read_pack

LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any)


def counted_corpus(lengths: list[int]) -> Corpus:
    """Every token of the corpus has its own id, its index plus 1, so that none can be taken for another or padding."""
    ids = iter(range(1, sum(lengths) + 1))
    return corpus_of([np.array([next(ids) for _ in range(n)], np.int64) for n in lengths], sum(lengths) + 1)


def packs(corpus: Corpus, seq_len: int, count: int, pad: bool = False, position: Position | None = None, seed: int = 0):
    packer = Packer(corpus, seq_len, seed, pad, position)
    return [packer.next() for _ in range(count)]


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 17), st.booleans(), st.integers(0, 3))
def test_every_token_comes_once_an_epoch(lengths, seq_len, pad, seed):
    corpus = counted_corpus(lengths)
    packer = Packer(corpus, seq_len, seed, pad)
    seen: list[int] = []
    while len(seen) < 2 * corpus.total:
        pack = read_pack(packer.next(), corpus)
        assert pack.tokens.shape == pack.labels.shape == (seq_len,)
        assert pack.docs.total == seq_len
        seen += [token for token in pack.tokens.tolist() if token != 0]
    for epoch in (0, 1):
        part = seen[epoch * corpus.total : (epoch + 1) * corpus.total]
        assert sorted(part) == list(range(1, corpus.total + 1))


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 17), st.booleans())
def test_labels_are_the_next_token_of_the_same_document(lengths, seq_len, pad):
    corpus = counted_corpus(lengths)
    last = set(np.cumsum(lengths).tolist())
    for plan in packs(corpus, seq_len, 12, pad):
        pack = read_pack(plan, corpus)
        for token, label in zip(pack.tokens.tolist(), pack.labels.tolist(), strict=True):
            # Also at the end of a pack: the label of a cut document is its true next token.
            assert label == (NO_TARGET if token == 0 or token in last else token + 1)
        assert pack.targets == plan.targets == int((pack.labels != NO_TARGET).sum())
        assert plan.tokens == int((pack.tokens != 0).sum())


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(1, 17))
def test_without_pad_no_token_is_padding(lengths, seq_len):
    assert all(plan.tokens == seq_len and not plan.docs.padding for plan in packs(counted_corpus(lengths), seq_len, 8))


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(1, 17))
def test_pad_splits_only_documents_longer_than_a_pack(lengths, seq_len):
    for plan in packs(counted_corpus(lengths), seq_len, 8, pad=True):
        for segment in plan.segments:
            whole = segment.start == 0 and segment.ends
            assert whole or lengths[segment.document] > seq_len
        assert plan.segments


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(1, 17), st.booleans(), st.integers(0, 20))
def test_resume_anywhere_equals_the_uninterrupted_stream(lengths, seq_len, pad, stop):
    corpus = counted_corpus(lengths)
    whole = packs(corpus, seq_len, stop + 6, pad)
    first = Packer(corpus, seq_len, 0, pad)
    for _ in range(stop):
        first.next()
    state = first.position.state_dict()
    assert all(type(value) is int for value in state.values())
    assert packs(corpus, seq_len, 6, pad, Position.from_state(state)) == whole[stop:]


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(1, 4), st.integers(1, 3))
def test_replicas_partition_the_stream(lengths, seq_len, replicas, micro_steps):
    corpus = counted_corpus(lengths)
    count = replicas * micro_steps
    streams = [
        batches(Packer(corpus, seq_len, 0), count, replica, replicas, lambda pack: pack) for replica in range(replicas)
    ]
    expected = iter(packs(corpus, seq_len, 3 * count))
    for _ in range(3):
        found = [next(stream) for stream in streams]
        assert len({batch.targets for batch in found}) == 1
        assert found[0].targets == sum(pack.targets for batch in found for pack in batch.micro)
        assert found[0].tokens == seq_len * count == sum(found[0].lengths)
        assert len({batch.position for batch in found}) == 1
        assert len({batch.counts.digest for batch in found}) == 1
        for replica, batch in enumerate(found):
            assert batch.targets_of(replica, replicas) == sum(pack.targets for pack in batch.micro)
        for micro, replica in itertools.product(range(micro_steps), range(replicas)):
            plan = next(expected)
            assert torch.equal(found[replica].micro[micro].tokens, read_pack(plan, corpus).tokens)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any), st.integers(1, 30), st.integers(0, 3))
def test_the_epoch_counts_tokens(lengths, seq_len, seed):
    """One long document among many short ones is not a small share of the corpus."""
    corpus = corpus_of([np.zeros(length, np.int64) for length in lengths], 4)
    packer = Packer(corpus, seq_len, seed)
    for packs in range(1, 2 * corpus.total // seq_len + 2):
        packer.next()
        assert packer.epoch == pytest.approx(packs * seq_len / corpus.total)
        assert Packer(corpus, seq_len, seed, position=packer.position).epoch == packer.epoch


def test_orders_differ_between_epochs_and_seeds():
    corpus = counted_corpus([1] * 50)

    def order(seed: int, epoch: int) -> list[int]:
        return read_pack(packs(corpus, 50, 1, position=Position(epoch), seed=seed)[0], corpus).tokens.tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_refusals_name_the_numbers():
    with pytest.raises(ValueError, match="every document is empty"):
        Packer(counted_corpus([0, 0]), 4, 0)
    with pytest.raises(ValueError, match="got 0"):
        Packer(counted_corpus([3]), 0, 0)
    with pytest.raises(ValueError, match="3 is no multiple of the 2"):
        next(batches(Packer(counted_corpus([3]), 2, 0), 3, 0, 2, lambda pack: pack))


def test_prefetcher_keeps_order_ends_and_passes_errors_on():
    with Prefetcher(iter(range(5)), depth=2) as stream:
        assert list(stream) == [0, 1, 2, 3, 4]

    def broken():
        yield 1
        raise OSError("disk")

    with Prefetcher(broken(), depth=2) as stream:
        assert next(stream) == 1
        for _ in range(2):
            with pytest.raises(OSError, match="disk"):
                next(stream)
    with Prefetcher(itertools.count(), depth=1) as stream:
        assert next(stream) == 0
    assert not stream._thread.is_alive()
