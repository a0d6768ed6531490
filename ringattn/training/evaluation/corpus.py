"""A made-up corpus that teaches a small model to look something up, far back, and to be asked for it.

Facts are words such as `kalomire`: the name `kalo` and the code `mire`. They stand between sentences that never change,
and questions are the name and the code as two words. A tokenizer that was trained on the corpus has a token for each
word, names, codes and facts included, so that an answer is one look-up: from the question's name to the fact. (With
name and code apart in the fact, as in `kalo mire`, a model has to learn an induction head, whose second layer reads
what the first one has copied. Two small layers had not learned it after four times as many tokens.)

Documents are of two kinds. In dense ones, short and full of facts and questions, the look-up is learned in some hundred
steps: each question is a target that can be known. In long ones a few facts stand anywhere, and all questions at the
end: they teach to find a fact from afar. Neither works alone: long ones have too few questions to begin with.

The form of the questions is that of associative recall (Arora et al., arXiv 2312.04927).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ringattn.training.evaluation.haystack import made_up_sentences, made_up_words
from ringattn.training.evaluation.tasks import Wording

NAMES, CODES = 8, 8
SENTENCES, WORDS = 16, 6
_WORDS = made_up_words(NAMES + CODES, seed=7)

PLAIN = Wording(
    intro="",
    needle=" {key}{value}",
    question=" {key}",
    questions=None,
    value=" {value}",
    keys=_WORDS[:NAMES],
    values=_WORDS[NAMES:],
)
"""Needles and questions as they stand in the corpus; chance is one of eight."""


def plain_sentences() -> list[str]:
    """The sentences of the corpus, each of six words after spaces."""
    return [sentence.rstrip(".") for sentence in made_up_sentences(SENTENCES, WORDS, seed=7)]


@dataclass(frozen=True)
class RetrievalCorpus:
    """Documents in an order that depends on the seed alone; lengths are in words, which are tokens of its tokenizer.

    Arguments:
        words: of all documents together, at least.
        shortest, longest: of long documents, whose lengths are drawn evenly on a logarithmic scale.
        dense: share of all words that dense documents have.
        dense_words: of each dense document.
        asked: how often each fact of a long document is asked for, at its end.
        seed: of everything that is drawn.

    Raises ValueError naming the argument for numbers that make no documents.
    """

    words: int
    shortest: int = 256
    longest: int = 1024
    dense: float = 0.5
    dense_words: int = 64
    asked: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        least = NAMES * (2 * self.asked + 1) + WORDS
        if self.words < 1:
            raise ValueError(f"words must be at least 1, got {self.words}")
        if self.asked < 1:
            raise ValueError(f"asked must be at least 1, got {self.asked}")
        if not least <= self.shortest <= self.longest:
            raise ValueError(
                f"shortest must be at least {least} and at most longest, got shortest={self.shortest} "
                f"longest={self.longest}"
            )
        if not 0 <= self.dense <= 1:
            raise ValueError(f"dense must be a share from 0 to 1, got {self.dense}")
        if self.dense_words < 4 * WORDS:
            raise ValueError(f"dense_words must be at least {4 * WORDS}, got {self.dense_words}")

    def documents(self) -> Iterator[str]:
        """The texts."""
        rng = np.random.default_rng([self.seed, 7])
        sentences = [sentence.split() for sentence in plain_sentences()]
        made = dense = 0
        while made < self.words:
            # Whichever kind has less than its share comes next, so that every part of the corpus has both.
            if dense < self.dense * (made + self.dense_words):
                words = _dense_document(self.dense_words, sentences, rng)
                dense += len(words)
            else:
                low, high = math.log(self.shortest), math.log(self.longest)
                words = _long_document(round(math.exp(rng.uniform(low, high))), self.asked, sentences, rng)
            made += len(words)
            yield "".join(f" {word}" for word in words)


def _facts(rng: np.random.Generator) -> list[tuple[str, str]]:
    """Two names or more, each with a code."""
    count = int(rng.integers(2, NAMES + 1))
    keys, values = PLAIN.draw(count, rng)
    return [*zip(keys, values, strict=True)]


def _dense_document(length: int, sentences: list[list[str]], rng: np.random.Generator) -> list[str]:
    """Facts that are told again and again, and asked for in between, with a sentence now and then."""
    facts, told, words = _facts(rng), set[int](), list[str]()
    while len(words) < length:
        if rng.random() < 0.1:
            words += sentences[int(rng.integers(len(sentences)))]
            continue
        number = int(rng.integers(len(facts)))
        name, code = facts[number]
        if number in told and rng.random() < 0.5:
            words += [name, code]
        else:
            words.append(name + code)
            told.add(number)
    return words[:length]


def _long_document(length: int, asked: int, sentences: list[list[str]], rng: np.random.Generator) -> list[str]:
    """Facts anywhere between sentences, then questions for all of them, several times in other orders."""
    facts = _facts(rng)
    order = [int(number) for _ in range(asked) for number in rng.permutation(len(facts))]
    questions = [word for number in order for word in facts[number]]
    room = length - len(questions) - len(facts)
    parts = [sentences[int(rng.integers(len(sentences)))] for _ in range(room // WORDS)]
    for name, code in facts:
        parts.insert(int(rng.integers(len(parts) + 1)), [name + code])
    return [*(word for part in parts for word in part), *questions]
