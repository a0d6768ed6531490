"""Mixtures and streams: weights within one document, every token once a pass, any place to go on from."""

import json
import pickle
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ringattn.training.data.corpus import Corpus, corpus_of
from ringattn.training.data.encoding import Encoding
from ringattn.training.data.mixture import MixedCorpus, Part, capped
from ringattn.training.data.shards import Shard
from ringattn.training.data.streaming import StreamedCorpus, StreamedPart
from ringattn.training.packs.batches import batches
from ringattn.training.packs.best_fit import BestFitPacker, BestFitPosition, fullest
from ringattn.training.packs.curriculum import Curriculum, CurriculumPacker, step_of
from ringattn.training.packs.grouping import GroupedPosition
from ringattn.training.packs.ordering import Position, place_of
from ringattn.training.packs.packing import Packer, PackPlan, Segment, read_pack

LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any)
SOURCES = st.lists(st.tuples(LENGTHS, st.sampled_from([0.3, 1.0, 2.5])), min_size=1, max_size=4)
# A stream without anything to predict ends with an error.
STREAMED = SOURCES.filter(lambda sources: all(max(lengths) > 1 for lengths, _ in sources))
PACKERS = ("order", "pad", "best_fit", "best_fit_pad")


def mixture(sources, epochs=None) -> MixedCorpus:
    """Every token of all sources has its own id, from 1 on."""
    parts, first = [], 1
    for number, (lengths, weight) in enumerate(sources):
        documents = []
        for length in lengths:
            documents.append(np.arange(first, first + length))
            first += length
        parts.append(Part(f"s{number}", corpus_of(documents, 10**6), weight, epochs))
    return MixedCorpus(tuple(parts))


def stream(sources, folder: Path, epochs=None, cap=None) -> StreamedCorpus:
    """The same documents in files of two records."""
    corpus, parts = mixture(sources), []
    for number, part in enumerate(corpus.parts):
        rows = [part.corpus.read(one, 0, part.corpus.length(one)).tolist() for one in range(len(part.corpus))]
        shards = []
        for begin in range(0, len(rows), 2):
            path = folder / f"{number}-{begin}.jsonl"
            path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows[begin : begin + 2]))
            shards.append(Shard(path))
        parts.append(StreamedPart(part.name, tuple(shards), Encoding("ids", "input_ids"), part.weight, epochs, cap))
    return StreamedCorpus(tuple(parts), 1 << 32, "stream")


def packer(kind: str, corpus, seq_len: int, state=None):
    if kind.startswith("best_fit"):
        position = None if state is None else BestFitPosition.from_state(state)
        return BestFitPacker(corpus, seq_len, 0, 5, kind.endswith("pad"), position)
    return Packer(corpus, seq_len, 0, kind == "pad", None if state is None else place_of(state))


def to_the_end(packer) -> list[PackPlan]:
    """All packs until the sources are used up."""
    plans = []
    for _ in range(10_000):
        try:
            plans.append(packer.next())
        except ValueError as error:
            assert "all sources are used up" in str(error)  # noqa: PT017
            return plans
    pytest.fail("it never ends")


def tokens_of(plans, corpus) -> list[int]:
    return [token for plan in plans for token in read_pack(plan, corpus).tokens.tolist() if token]


@settings(max_examples=60)
@given(SOURCES, st.integers(1, 17))
def test_a_source_is_ahead_of_its_share_by_one_document_at_most(sources, seq_len):
    corpus = mixture(sources)
    stream = Packer(corpus, seq_len, 0)
    weights = np.asarray([weight for _, weight in sources])
    longest = np.asarray([max(lengths) for lengths, _ in sources])
    for _ in range(40):
        stream.next()
        drawn = np.asarray(stream.position.drawn)
        share = weights / weights.sum() * drawn.sum()
        assert (drawn - share <= longest + 1e-9).all()
        assert (share - drawn <= weights / weights.sum() * longest.sum() + 1e-9).all()


@settings(max_examples=60)
@given(SOURCES, st.integers(1, 17), st.sampled_from(PACKERS), st.integers(1, 2))
def test_every_token_comes_once_in_each_epoch_of_its_source(sources, seq_len, kind, epochs):
    corpus = mixture(sources, epochs)
    plans = to_the_end(packer(kind, corpus, seq_len))
    seen = Counter(tokens_of(plans, corpus))
    assert max(seen.values(), default=0) <= epochs
    missing = epochs * corpus.total - sum(seen.values())  # what does not fill a pack any more
    assert missing == 0 if kind == "best_fit_pad" else 0 <= missing < seq_len


@settings(max_examples=60)
@given(SOURCES, st.integers(1, 17), st.integers(0, 15), st.sampled_from(PACKERS))
def test_resume_anywhere_equals_the_uninterrupted_mixture(sources, seq_len, stop, kind):
    corpus = mixture(sources)
    whole = packer(kind, corpus, seq_len)
    for _ in range(stop):
        whole.next()
    state = json.loads(json.dumps(whole.position.state_dict()))
    again = packer(kind, corpus, seq_len, state)
    assert [whole.next() for _ in range(8)] == [again.next() for _ in range(8)]


@settings(max_examples=25)
@given(STREAMED, st.integers(1, 17), st.integers(0, 12), st.sampled_from(PACKERS))
def test_a_stream_goes_on_anywhere_and_in_another_process(tmp_path_factory, sources, seq_len, stop, kind):
    folder = tmp_path_factory.mktemp("stream")
    whole = packer(kind, stream(sources, folder), seq_len)
    for _ in range(stop):
        whole.next()
    state = json.loads(json.dumps(whole.position.state_dict()))
    expected = [whole.next() for _ in range(6)]
    sent = pickle.loads(pickle.dumps(packer(kind, stream(sources, folder), seq_len, state)))
    assert [sent.next() for _ in range(6)] == expected
    assert tokens_of(expected, stream(sources, folder)) == tokens_of(expected, whole.corpus)


@settings(max_examples=25)
@given(STREAMED, st.integers(1, 17), st.integers(1, 2))
def test_a_stream_has_every_token_once_a_pass(tmp_path_factory, sources, seq_len, epochs):
    corpus = stream(sources, tmp_path_factory.mktemp("stream"), epochs)
    plans = to_the_end(packer("best_fit_pad", corpus, seq_len))
    total = sum(sum(lengths) for lengths, _ in sources)
    assert Counter(tokens_of(plans, corpus)) == dict.fromkeys(range(1, total + 1), epochs)


@settings(max_examples=25)
@given(STREAMED, st.integers(1, 17), st.integers(1, 12), st.integers(0, 9), st.sampled_from(PACKERS))
def test_a_cap_of_a_stream_never_stops_it_midway(tmp_path_factory, sources, seq_len, cap, stop, kind):
    """Whatever document the order of a pass begins with; those that no pass can hold are passed over."""
    folder = tmp_path_factory.mktemp("stream")
    longest = [max((length for length in lengths if length <= cap), default=0) for lengths, _ in sources]
    assume(1 not in longest)  # nothing to predict
    fitting = [length > 0 for length in longest]
    whole = packer(kind, stream(sources, folder, cap=cap), seq_len)
    if not all(fitting):
        name = f"'s{fitting.index(False)}' holds no document of at most max_tokens={cap}"
        with pytest.raises(ValueError, match=name):
            whole.next()
        return
    plans = [whole.next() for _ in range(stop)]
    state = json.loads(json.dumps(whole.position.state_dict()))
    again = packer(kind, stream(sources, folder, cap=cap), seq_len, state)
    after = [whole.next() for _ in range(12)]
    assert [again.next() for _ in range(12)] == after
    for segment in (segment for plan in plans + after for segment in plan.segments):
        assert whole.corpus.length(segment.document) <= cap


@settings(max_examples=25)
@given(SOURCES, st.integers(1, 9), st.sampled_from(PACKERS), st.integers(0, 4))
def test_other_replicas_go_on_with_the_same_packs(sources, seq_len, kind, stop):
    """Four packs a step over one, two and four replicas."""
    corpus = mixture(sources)
    taken = packer(kind, corpus, seq_len)
    for _ in range(stop):
        taken.step(4)
    state, expected = taken.position.state_dict(), taken.step(4)
    for replicas in (1, 2, 4):
        found = [
            next(batches(packer(kind, corpus, seq_len, state), 4, replica, replicas, lambda pack: pack))
            for replica in range(replicas)
        ]
        for index, plan in enumerate(expected):
            pack = found[index % replicas].micro[index // replicas]
            assert pack.tokens.tolist() == read_pack(plan, corpus).tokens.tolist()
        assert len({batch.targets for batch in found}) == 1


@settings(max_examples=60)
@given(LENGTHS, st.integers(1, 17), st.integers(1, 6))
def test_best_fit_pads_nothing_and_nobody_waits_long(lengths, seq_len, lookahead):
    corpus = mixture([(lengths, 1.0)])
    taken = BestFitPacker(corpus, seq_len, 0, lookahead)
    for _ in range(20):
        before = taken.position.waiting
        plan = taken.next()
        assert plan.tokens == seq_len
        if before:
            assert plan.segments[0].document == before[0].document
            assert plan.segments[0].start == before[0].start


def test_best_fit_cuts_fewer_documents_than_the_order_of_the_stream():
    """Lengths as of chats. In order every pack ends with a cut, or with padding of a sixth."""
    lengths = np.random.default_rng(0).lognormal(7.5, 0.8, 2000).astype(int).tolist()
    corpus = mixture([(lengths, 1.0)])

    def cuts_and_padding(packer) -> tuple[int, float]:
        plans = packer.step(int(0.9 * corpus.total) // 8192)
        cuts = sum(not segment.ends for plan in plans for segment in plan.segments)
        return cuts, 1 - sum(plan.tokens for plan in plans) / 8192 / len(plans)

    cuts, padding = cuts_and_padding(BestFitPacker(corpus, 8192, 0, 256))
    assert cuts < 0.3 * cuts_and_padding(Packer(corpus, 8192, 0))[0]
    assert padding == 0
    assert cuts_and_padding(BestFitPacker(corpus, 8192, 0, 256, pad=True))[1] < 0.01
    assert cuts_and_padding(Packer(corpus, 8192, 0, pad=True))[1] > 0.1


@settings(max_examples=60)
@given(LENGTHS, st.integers(1, 40), st.integers(1, 300), st.integers(1, 12))
def test_best_fit_counts_what_it_packed_and_keeps_no_more_waiting_than_there_are(lengths, seq_len, lookahead, packs):
    """A few chats are not read ten times over to fill the places to wait, nor is what is empty counted among them."""
    corpus = mixture([(lengths, 1.0)])
    packer = BestFitPacker(corpus, seq_len, 0, lookahead)
    plans = packer.step(packs)
    assert packer.epoch == pytest.approx(packs * seq_len / corpus.total)
    waiting = packer.position.waiting
    assert len(waiting) <= min(lookahead, sum(length > 0 for length in lengths))
    seen = Counter(tokens_of([*plans, *(PackPlan((one,), one.stop - one.start) for one in waiting)], corpus))
    times = [seen[token] for token in range(1, corpus.total + 1)]
    assert max(times) - min(times) <= 1  # packed or waiting, documents come in the order of passes, and none is lost


def test_best_fit_by_hand():
    corpus = corpus_of([np.ones(6), np.ones(3), np.ones(5), np.ones(2)], 4)
    taken = BestFitPacker(corpus, 8, 1, 4)
    taken._waiting = [Segment(0, 0, 6, True), Segment(1, 0, 3, True), Segment(2, 0, 5, True), Segment(3, 0, 2, True)]
    assert taken.next().segments == (Segment(0, 0, 6, True), Segment(3, 0, 2, True))


@given(st.lists(st.integers(1, 12), max_size=8), st.integers(1, 30))
def test_the_fullest_set_is_the_best_of_all(sizes, room):
    sets = [chosen for count in range(len(sizes) + 1) for chosen in combinations(range(len(sizes)), count)]
    best = max(total for one in sets if (total := sum(sizes[at] for at in one)) <= room)
    chosen = fullest(sizes, room)
    assert sum(sizes[at] for at in chosen) == best
    assert sorted(set(chosen)) == chosen


@given(LENGTHS, st.integers(0, 8), st.sampled_from(PACKERS))
def test_a_curriculum_goes_on_anywhere(lengths, stop, kind):
    corpus, lengths_of = mixture([(lengths, 1.0)]), Curriculum(((0, 3), (2, 7), (5, 4)))

    def made(state=None):
        return CurriculumPacker(packer(kind, corpus, 1, state), lengths_of, step_of(state or {}))

    whole = made()
    plans = [whole.step(2) for _ in range(stop)]
    assert [plan.seq_len for step in plans for plan in step] == [
        [3, 3, 7, 7, 7, 4, 4, 4][at] for at in range(stop) for _ in "ab"
    ]
    again = made(json.loads(json.dumps(whole.position.state_dict())))
    assert [again.step(2) for _ in range(4)] == [whole.step(2) for _ in range(4)]


def test_the_tokens_of_a_curriculum():
    lengths = Curriculum(((0, 10), (3, 20)))
    assert [lengths.tokens(steps, 2) for steps in (0, 2, 3, 5)] == [0, 40, 60, 140]
    assert Curriculum(((0, 10),)).tokens(4, 1) == 40


@given(st.lists(st.lists(st.booleans(), min_size=0, max_size=20), min_size=1, max_size=6), st.integers(1, 9))
def test_targets_are_what_is_learned_and_counted_without_reading_labels(masks, seq_len):
    documents = [np.arange(len(mask)) for mask in masks]
    whole = corpus_of(documents, 100)
    if not whole.total:
        return
    flat = np.concatenate([np.asarray(mask, np.uint8) for mask in masks])
    corpus = Corpus(whole.tokens, whole.offsets, 100, "x", flat)
    stream = batches(Packer(corpus, seq_len, 0), 1, 0, 1, lambda pack: pack)
    for _ in range(6):
        batch = next(stream)
        begin = 0
        for segment in batch.plans[0].segments:
            for place in range(segment.start, segment.stop):
                following = place + 1 < len(masks[segment.document]) and masks[segment.document][place + 1]
                label = int(batch.micro[0].labels[begin])
                assert label == (place + 1 if following else -100)
                begin += 1
        assert batch.targets == int((batch.micro[0].labels != -100).sum()) == batch.micro[0].targets


def test_who_waits_by_one_rule_is_not_dropped_by_another():
    corpus = mixture([([5, 9, 3, 7, 2], 1.0)])
    taken = BestFitPacker(corpus, 4, 0, 5)
    taken.next()
    state = taken.position.state_dict()
    for rule in (Position, GroupedPosition):
        with pytest.raises(ValueError, match="documents that wait"):
            rule.from_state(state)
    with pytest.raises(ValueError, match="1 documents that wait"):
        BestFitPosition.from_state(Position().state_dict() | {"unusual": [[0, 0, 4, True, 3]]})


def test_a_cap_takes_whole_documents():
    corpus = corpus_of([np.ones(4), np.ones(3), np.ones(5)], 4)
    assert capped(corpus, 7).total == 7
    assert capped(corpus, 11).total == 7
    assert capped(corpus, 100).total == capped(corpus, None).total == 12
    with pytest.raises(ValueError, match="max_tokens=3 is less than the first document, which has 4"):
        capped(corpus, 3)


def test_a_masked_memory_map_is_opened_elsewhere(tmp_path):
    tokens = np.memmap(tmp_path / "t", np.uint8, "w+", shape=(4,))
    mask = np.memmap(tmp_path / "m", np.uint8, "w+", shape=(4,))
    tokens[:], mask[:] = [1, 2, 3, 4], [0, 1, 0, 1]
    corpus = Corpus(tokens, np.asarray([0, 4]), 9, "x", mask)
    data = pickle.dumps(corpus)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert again.read(0, 0, 4).tolist() == [1, 2, 3, 4]
    assert again.learned(0, 1, 4).tolist() == [True, False, True]
