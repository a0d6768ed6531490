"""Grouped packs: every token once, equal tokens, near equal cost, nobody waits too long, any place to resume."""

import json
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn.training.data.corpus import Corpus
from ringattn.training.packs.batches import batches
from ringattn.training.packs.grouping import DocumentCost, GroupedPacker, GroupedPosition, fill
from ringattn.training.packs.ordering import Position
from ringattn.training.packs.packing import Packer, PackPlan, Segment, read_pack
from ringattn.workloads import HISTOGRAMS
from tests.training.packs.test_packing import LENGTHS, counted_corpus

SQUARES = DocumentCost(lambda length: float(length) ** 2)
# Many short documents and a few that are long against a pack: those have to wait.
SKEWED = st.lists(st.one_of(st.integers(0, 4), st.integers(10, 40)), min_size=1, max_size=30).filter(any)


def tokens_of(plans: list[PackPlan]) -> list[tuple[int, int]]:
    return [
        (segment.document, token)
        for plan in plans
        for segment in plan.segments
        for token in range(segment.start, segment.stop)
    ]


@settings(max_examples=100, deadline=None)
@given(st.one_of(LENGTHS, SKEWED), st.integers(1, 20), st.integers(1, 5), st.integers(0, 4))
def test_what_was_read_is_packed_once_or_waits_its_time(lengths, seq_len, packs, delay):
    corpus = counted_corpus(lengths)
    packer = GroupedPacker(corpus, seq_len, 0, SQUARES, delay)
    plans: list[PackPlan] = []
    for step in range(8):
        plans += packer.step(packs)
        position = packer.position
        assert all(step - one.read < delay for one in position.unusual)
        assert all(step - one.read <= delay for one in position.rest)
        assert len(position.unusual) <= packs * delay
    assert all(plan.tokens == seq_len == plan.docs.total for plan in plans)
    packed = sorted(tokens_of(plans))
    waiting = [one.segment for one in (*packer.position.rest, *packer.position.unusual)]
    waits = [(segment.document, token) for segment in waiting for token in range(segment.start, segment.stop)]
    stream, read = Packer(corpus, seq_len, 0), []
    while stream.position != packer.position.stream:
        segment = stream.draw(seq_len)
        read += [(segment.document, token) for token in range(segment.start, segment.stop)]
    assert sorted(packed + waits) == sorted(read)


@settings(max_examples=50, deadline=None)
@given(SKEWED, st.integers(1, 20), st.integers(1, 4), st.integers(0, 3))
def test_labels_are_the_next_token_of_the_same_document(lengths, seq_len, packs, delay):
    corpus = counted_corpus(lengths)
    last = set(np.cumsum(lengths).tolist())
    packer = GroupedPacker(corpus, seq_len, 0, SQUARES, delay)
    for _ in range(3):
        for plan in packer.step(packs):
            pack = read_pack(plan, corpus)
            for token, label in zip(pack.tokens.tolist(), pack.labels.tolist(), strict=True):
                assert label == (-100 if token in last else token + 1)
            assert pack.targets == int((pack.labels != -100).sum())


@settings(max_examples=50, deadline=None)
@given(SKEWED, st.integers(1, 20), st.integers(1, 4), st.integers(0, 4), st.integers(0, 6))
def test_resume_anywhere_equals_the_uninterrupted_stream(lengths, seq_len, packs, delay, stop):
    corpus = counted_corpus(lengths)
    whole = GroupedPacker(corpus, seq_len, 3, SQUARES, delay)
    steps = [whole.step(packs) for _ in range(stop + 4)]
    first = GroupedPacker(corpus, seq_len, 3, SQUARES, delay)
    for _ in range(stop):
        first.step(packs)
    state = json.loads(json.dumps(first.position.state_dict()))
    rest = GroupedPacker(corpus, seq_len, 3, SQUARES, delay, GroupedPosition.from_state(state))
    assert [rest.step(packs) for _ in range(4)] == steps[stop:]


@settings(max_examples=200, deadline=None)
@given(st.data(), st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_fill_deals_every_token_once_into_full_packs(data, sizes):
    segments, left = [], sum(sizes)
    while left:
        size = data.draw(st.integers(1, left))
        segments.append(Segment(len(segments), 5, 5 + size, True))
        left -= size
    filled = fill(segments, sizes, SQUARES.attention)
    assert [sum(one.stop - one.start for one in pack) for pack in filled] == sizes
    pieces = sorted((one.document, one.start, one.stop, one.ends) for pack in filled for one in pack)
    for segment in segments:
        own = [piece for piece in pieces if piece[0] == segment.document]
        assert own[0][1] == segment.start
        assert own[-1][2:] == (segment.stop, True)
        assert all(a[2] == b[1] and not a[3] for a, b in pairwise(own))


def test_documents_alike_are_one_to_a_pack():
    """Four long documents among short ones: alone each would make its pack dear, together they cost nobody time."""
    lengths = [64, 2, 3, 2] * 4 + [2] * 200
    packer = GroupedPacker(counted_corpus(lengths), 64, 0, SQUARES, 50)
    steps = [[max(plan.docs.lengths) for plan in packer.step(4)] for _ in range(10)]
    assert any(max(longest) > 32 for longest in steps)
    assert all(max(longest) - min(longest) <= 1 for longest in steps)


def histogram_corpus(documents: int) -> Corpus:
    random = Random(0)
    lengths = [HISTOGRAMS["chatqa"].draw(random) for _ in range(documents)]
    return Corpus(np.zeros(0, np.uint8), np.cumsum([0, *lengths]), 256, "lengths only")


@pytest.mark.parametrize(("seq_len", "packs", "at_most"), [(65536, 4, 1.05), (65536, 16, 1.06), (262144, 8, 1.06)])
def test_published_histogram_is_even(seq_len, packs, at_most):
    """Of all steps together: seconds of the slowest packs over those of the average ones, attention alone."""
    corpus = histogram_corpus(30_000)

    def unevenness(packer) -> float:
        steps = [[SQUARES(plan.docs.lengths) for plan in packer.step(packs)] for _ in range(20)]
        return sum(map(max, steps)) / sum(sum(costs) / packs for costs in steps)

    assert unevenness(GroupedPacker(corpus, seq_len, 0, SQUARES, 32)) < at_most
    assert unevenness(Packer(corpus, seq_len, 0)) > 1.8


def test_replicas_share_the_packs_of_a_step_whatever_their_number():
    corpus = counted_corpus([9, 30, 2, 2, 3, 1, 28, 14] * 4)
    expected = GroupedPacker(corpus, 16, 0, SQUARES, 4)
    steps = [expected.step(4) for _ in range(3)]
    for replicas in (1, 2, 4):
        streams = [
            batches(GroupedPacker(corpus, 16, 0, SQUARES, 4), 4, replica, replicas, lambda pack: pack.docs.lengths)
            for replica in range(replicas)
        ]
        for plans in steps:
            found = [next(stream) for stream in streams]
            assert all(batch.plans == plans for batch in found)
            micro = [lengths for m in range(4 // replicas) for batch in found for lengths in [batch.micro[m]]]
            assert micro == [plan.docs.lengths for plan in plans]
        assert found[0].position.state_dict() == expected.position.state_dict()


def test_the_other_cost_counts_by_tokens():
    assert DocumentCost(lambda length: length * length, 10.0)([3, 4]) == 25 + 70


def test_a_state_with_waiting_documents_is_never_dropped():
    packer = GroupedPacker(counted_corpus([15] + [2] * 40), 16, 0, SQUARES, 9)
    states = [(packer.step(2), packer.position)[1] for _ in range(3)]
    assert states[-1].unusual
    with pytest.raises(ValueError, match=r"data\.delay"):
        Position.from_state(packer.position.state_dict())
    plain = Position(1, 2, 3)
    assert GroupedPosition.from_state(plain.state_dict()) == GroupedPosition(plain)
    with pytest.raises(ValueError, match="got -1"):
        GroupedPacker(counted_corpus([3]), 4, 0, SQUARES, -1)
