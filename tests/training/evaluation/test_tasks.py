"""Retrieval tasks: what stands where, for any tokenizer, and how answers are counted."""

import math
from typing import Any

import numpy as np
import pytest

from ringattn.training.data.tokenizer import BYTES, load_tokenizer
from ringattn.training.evaluation.corpus import CODES, NAMES, PLAIN, RetrievalCorpus, plain_sentences
from ringattn.training.evaluation.haystack import (
    Haystack,
    encoder,
    made_up_sentences,
    made_up_words,
    sentences_of,
)
from ringattn.training.evaluation.passes import NO_BIN
from ringattn.training.evaluation.tasks import RULER, Example, TaskMaker, Wording

encode = encoder(load_tokenizer(BYTES, False))


def maker(wording: Wording = RULER, seed: int = 0) -> TaskMaker:
    return TaskMaker(encode, Haystack.of(made_up_sentences(), encode), wording, seed)


def text(ids: Any) -> str:
    return bytes(np.asarray(ids).astype(np.uint8)).decode()


def marked(example: Example) -> list[str]:
    """The text of each part that is scored, by its number."""
    bins = example.bins(5)
    return [text(example.ids[bins == number]) for number in range(5, 5 + len(example.answers))]


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_needle_stands_at_its_depth(depth: float) -> None:
    example = maker().needle(4000, depth, 0)
    whole = text(example.ids)
    assert 3900 < len(whole) <= 4000
    key = whole.split("One of the special magic numbers for ")[1].split(" ")[0]
    value = whole.split(f"numbers for {key} is: ")[1][:7]
    body = whole[len(RULER.intro) : whole.index(" What is the special")]
    assert body.index(" One of the special") / len(body) == pytest.approx(depth, abs=0.05)
    assert whole.endswith(f"The special magic number for {key} mentioned in the provided text is {value}")
    assert marked(example) == [f" {value}"]
    assert (example.bins(0) == NO_BIN).sum() == len(whole) - 8


def test_the_same_seed_makes_the_same_examples() -> None:
    for make in (
        lambda of: of.needle(2000, 0.5, 3, 4),
        lambda of: of.multi_needle(2000, 3, 4, 2),
        lambda of: of.variable_tracking(2000, 3, 2, 3),
    ):
        assert np.array_equal(make(maker()).ids, make(maker()).ids)
        assert not np.array_equal(make(maker()).ids, make(maker(seed=1)).ids)


@pytest.mark.parametrize("wording", [RULER, PLAIN])
def test_several_needles_are_asked_in_order(wording: Wording) -> None:
    example = maker(wording).multi_needle(3000, 1, needles=5, asked=3)
    whole = text(example.ids)
    values = [part.strip() for part in marked(example)]
    assert len(values) == 3
    for value in values:
        assert whole.count(value) >= 2  # hidden, and answered
    if wording is RULER:
        assert whole.count("One of the special magic numbers") == 5
        assert whole.endswith(f"mentioned in the provided text are {values[0]}, {values[1]}, {values[2]}")
    with pytest.raises(ValueError, match="all of the 2 needles"):
        maker().multi_needle(3000, 1, needles=2, asked=3)
    with pytest.raises(ValueError, match="9 needles need as many keys, and there are 8"):
        maker(PLAIN).multi_needle(3000, 1, needles=9, asked=3)


def test_variables_follow_from_each_other() -> None:
    example = maker().variable_tracking(3000, 0, chains=2, hops=3)
    whole = text(example.ids)
    names = [part.strip() for part in marked(example)]
    value = whole.split("assigned the value ")[1].split(" ")[0]
    known, places = {value}, []
    for line in whole.split(" Question:")[0].replace(". ", ".\n").split("\n"):
        if "VAR " in line:
            words = line[line.index("VAR ") :].rstrip(".").replace("VAR ", "").split(" = ")
            if words[1] in known:
                known.add(words[0])
                places.append(words[0])
    assert places == names
    assert len(set(names)) == 4
    assert whole.count("VAR ") == 2 * (1 + 2 * 3)
    assert whole.endswith(" ".join(["they are:", *names]))


def test_too_short_a_document() -> None:
    with pytest.raises(ValueError, match=r"have \d+ tokens, more than a length of 100"):
        maker().needle(100, 0.5, 0)


def test_haystacks_of_given_texts() -> None:
    assert sentences_of(["One.  Two is\nlonger! three"]) == [" One.", " Two is longer!", " three"]
    assert [len(one) for one in sentences_of(["x" * 450])] == [201, 201, 51]
    with pytest.raises(ValueError, match="at least one sentence"):
        Haystack.of(["", ""], encode)
    filled = Haystack.of([" ab.", " c."], encode).fill(9, np.random.default_rng(0))
    assert sorted(map(len, filled)) in ([3, 4], [3, 3], [4, 4])
    assert Haystack.of([" ab."], encode).fill(3, np.random.default_rng(0)) == []


def test_words_are_different() -> None:
    words = made_up_words(5000, 0)
    assert len(set(words)) == 5000
    with pytest.raises(ValueError, match="got 6401"):
        made_up_words(6401, 0)


def test_the_corpus_says_what_it_asks() -> None:
    corpus = RetrievalCorpus(20_000, seed=3)
    documents = [*corpus.documents()]
    assert documents == [*RetrievalCorpus(20_000, seed=3).documents()]
    assert documents != [*RetrievalCorpus(20_000, seed=4).documents()]
    lengths = [len(document.split()) for document in documents]
    assert sum(lengths) >= 20_000
    dense = [length for length in lengths if length == 64]
    assert sum(dense) / sum(lengths) == pytest.approx(0.5, abs=0.03)
    long = [length for length in lengths if length != 64]
    assert 240 < min(long) < 400 < 700 < max(long) <= 1024
    names, codes = PLAIN.keys, PLAIN.values
    assert codes is not None
    assert len({*names, *codes}) == NAMES + CODES
    sentence_words = {word for sentence in plain_sentences() for word in sentence.split()}
    for document in documents:
        facts: dict[str, str] = {}
        words = document.split()
        for word, following in zip(words, words[1:] + [""], strict=True):
            if word[:4] in names and word[4:] in codes:
                assert facts.setdefault(word[:4], word[4:]) == word[4:]
            elif word in names:
                assert following in (facts[word], "")  # a dense document may end with a name
            else:
                assert word in sentence_words or word in codes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"words": 0}, "words must be at least 1"),
        ({"words": 9, "shortest": 20}, "shortest must be at least 62"),
        ({"words": 9, "shortest": 300, "longest": 200}, "shortest=300 longest=200"),
        ({"words": 9, "dense": 1.5}, "dense must be a share"),
        ({"words": 9, "dense_words": 3}, "dense_words must be at least 24"),
        ({"words": 9, "asked": 0}, "asked must be at least 1"),
    ],
)
def test_no_such_corpus(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RetrievalCorpus(**arguments)


@pytest.mark.parametrize("dense", [0.0, 1.0])
def test_a_corpus_of_one_kind(dense: float) -> None:
    lengths = {len(document.split()) == 64 for document in RetrievalCorpus(3000, dense=dense).documents()}
    assert lengths == {dense == 1.0}


def test_every_word_is_a_token_of_a_tokenizer_that_was_trained_on_it() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    documents = [*RetrievalCorpus(60_000).documents()]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1024, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    assert tokenizer.get_vocab_size() < 720
    assert all(len(tokenizer.encode(one).ids) == len(one.split()) for one in documents[:200])


def test_depths_of_several_needles_are_no_number() -> None:
    assert math.isnan(maker().multi_needle(3000, 1, 2, 1).depth)
    assert maker().needle(3000, 0.5, 1).depth == 0.5
