"""Retrieval tasks as documents whose last tokens are the answer: needles in haystacks, several of them, and variables.

The tasks are those of RULER (Hsieh et al., arXiv 2404.06654), made here, offline, for any tokenizer. RULER lets a model
generate and looks for the answers in what it wrote; here the right answer stands in the document, and it is right if
each of its tokens is the most probable one after those before it: what greedy decoding would have written. Where an
answer has several parts, they stand in the order of the question, and each is right or wrong by itself.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ringattn.training.evaluation.haystack import Encode, Haystack, Ids, made_up_words
from ringattn.training.evaluation.passes import NO_BIN


@dataclass(frozen=True)
class Example:
    """A document with a question at its end, and the answer.

    Arguments:
        prompt: token ids up to the answer.
        answers: token ids of each part of the answer, in order.
        between: token ids that stand between two parts, and are given.
        length: tokens that were asked for; the document has as many, or a sentence less.
        depth: of the needle, from 0 (beginning) to 1 (end); NaN where there are several.
    """

    prompt: Ids
    answers: tuple[Ids, ...]
    between: tuple[Ids, ...]
    length: int
    depth: float

    @cached_property
    def ids(self) -> Ids:
        """All tokens of the document."""
        return np.concatenate([self.prompt, *(part for part, _ in self._parts())])

    def bins(self, first: int) -> Ids:
        """For each token the number of its part of the answer, counted from `first`; -1 for what is no answer."""
        marks = [np.full(len(self.prompt), NO_BIN)]
        marks += [np.full(len(part), NO_BIN if number is None else first + number) for part, number in self._parts()]
        return np.concatenate(marks)

    def _parts(self) -> list[tuple[Ids, int | None]]:
        parts: list[tuple[Ids, int | None]] = []
        for number, answer in enumerate(self.answers):
            if number:
                parts.append((self.between[number - 1], None))
            parts.append((answer, number))
        return parts


@dataclass(frozen=True)
class Wording:
    """How needles and questions are written.

    Arguments:
        intro: before the haystack.
        needle: with {key} and {value}.
        question: for one key, before its value.
        questions: for several {keys}, before all their values; None: `question` and value, again and again.
        value: with {value}, after a question.
        keys: to draw from.
        values: to draw from; None: numbers of seven digits.
    """

    intro: str
    needle: str
    question: str
    questions: str | None
    value: str
    keys: Sequence[str]
    values: Sequence[str] | None

    def draw(self, count: int, rng: np.random.Generator) -> tuple[list[str], list[str]]:
        """Different keys, and a value for each. Raises ValueError where there are fewer keys."""
        if count > len(self.keys):
            raise ValueError(f"{count} needles need as many keys, and there are {len(self.keys)}")
        keys = [self.keys[number] for number in rng.permutation(len(self.keys))[:count]]
        if self.values is None:
            return keys, [str(number) for number in rng.integers(10**6, 10**7, count).tolist()]
        return keys, [self.values[number] for number in rng.integers(len(self.values), size=count)]


# Of RULER's `niah` tasks.
RULER = Wording(
    intro="Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the numbers afterwards.",
    needle=" One of the special magic numbers for {key} is: {value}.",
    question=" What is the special magic number for {key} mentioned in the provided text? The special magic number for "
    "{key} mentioned in the provided text is",
    questions=" What are all the special magic numbers for {keys} mentioned in the provided text? The special magic "
    "numbers for {keys} mentioned in the provided text are",
    value=" {value}",
    keys=made_up_words(400, seed=1, syllables=3),
    values=None,
)


class TaskMaker:
    """Makes examples of given lengths, from a tokenizer, a haystack and a wording. The same seed, the same examples."""

    def __init__(self, encode: Encode, haystack: Haystack, wording: Wording, seed: int) -> None:
        self.encode, self.haystack, self.wording, self.seed = encode, haystack, wording, seed

    def needle(self, length: int, depth: float, sample: int, others: int = 0) -> Example:
        """One needle at a depth, and `others` with other keys anywhere."""
        rng = self._random(length, round(1000 * depth), sample)
        keys, values = self.wording.draw(1 + others, rng)
        needles = [self._needle(key, value) for key, value in zip(keys, values, strict=True)]
        depths = [depth, *rng.random(others).tolist()]
        return self._example(length, depth, needles, depths, keys[:1], values[:1], rng)

    def multi_needle(self, length: int, sample: int, needles: int, asked: int) -> Example:
        """`needles` with different keys anywhere, `asked` of them asked for: RULER's multi-query with multi-key."""
        if not 1 <= asked <= needles:
            raise ValueError(f"at least one and at most all of the {needles} needles can be asked for, got {asked}")
        rng = self._random(length, 1001, sample)
        keys, values = self.wording.draw(needles, rng)
        hidden = [self._needle(key, value) for key, value in zip(keys, values, strict=True)]
        return self._example(length, np.nan, hidden, rng.random(needles).tolist(), keys[:asked], values[:asked], rng)

    def variable_tracking(self, length: int, sample: int, chains: int = 1, hops: int = 4) -> Example:
        """RULER's variable tracking: which variables have a value, over `hops` assignments of one to the next.

        Every further chain assigns another value to other variables.
        """
        if chains < 1 or hops < 1:
            raise ValueError(f"chains and hops must be at least 1, got {chains} and {hops}")
        rng = self._random(length, 1002, sample)
        names = ["".join(chr(65 + letter) for letter in row) for row in _different_rows(chains * (hops + 1), rng)]
        values = rng.integers(10**4, 10**5, chains).tolist()
        needles, depths = [], []
        for chain in range(chains):
            own = names[chain * (hops + 1) : (chain + 1) * (hops + 1)]
            lines = [f" VAR {own[0]} = {values[chain]}."]
            lines += [f" VAR {name} = VAR {before}." for before, name in itertools.pairwise(own)]
            needles += [self.encode(line) for line in lines]
            depths += sorted(rng.random(len(lines)).tolist())
        question = (
            f" Question: Find all variables that are assigned the value {values[0]} in the text above. Answer: "
            "According to the chain(s) of variable assignment in the text above, "
            f"{hops + 1} variables are assigned the value {values[0]}, they are:"
        )
        intro = self.encode("Memorize and track the chain(s) of variable assignment hidden in the following text.")
        answers = tuple(self.encode(f" {name}") for name in names[: hops + 1])
        between = (np.zeros(0, np.int64),) * hops
        return self._assembled(length, np.nan, intro, needles, depths, self.encode(question), answers, between, rng)

    def _needle(self, key: str, value: str) -> Ids:
        return self.encode(self.wording.needle.format(key=key, value=value))

    def _example(
        self,
        length: int,
        depth: float,
        needles: list[Ids],
        depths: list[float],
        keys: list[str],
        values: list[str],
        rng: np.random.Generator,
    ) -> Example:
        wording, encode = self.wording, self.encode
        answers = tuple(encode(wording.value.format(value=value)) for value in values)
        if len(keys) == 1 or wording.questions is None:
            question = encode(wording.question.format(key=keys[0]))
            between = tuple(encode(wording.question.format(key=key)) for key in keys[1:])
        else:
            question = encode(wording.questions.format(keys=_listed(keys)))
            between = (encode(","),) * (len(keys) - 1)
        return self._assembled(length, depth, encode(wording.intro), needles, depths, question, answers, between, rng)

    def _assembled(
        self,
        length: int,
        depth: float,
        intro: Ids,
        needles: list[Ids],
        depths: list[float],
        question: Ids,
        answers: tuple[Ids, ...],
        between: tuple[Ids, ...],
        rng: np.random.Generator,
    ) -> Example:
        """Puts the needles between sentences, each at its depth. Raises ValueError for too short a length."""
        taken = sum(map(len, [intro, *needles, question, *answers, *between]))
        if taken > length:
            raise ValueError(f"needles, question and answer have {taken} tokens, more than a length of {length}")
        sentences = self.haystack.fill(length - taken, rng)
        places = [round(one * len(sentences)) for one in depths]
        for place, needle in sorted(zip(places, needles, strict=True), key=lambda pair: -pair[0]):
            sentences.insert(place, needle)  # from the end, so that places before it stay what they are
        return Example(np.concatenate([intro, *sentences, question]), answers, between, length, depth)

    def _random(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *numbers])


def _different_rows(count: int, rng: np.random.Generator) -> list[list[int]]:
    """Rows of five letters, no two of them alike."""
    rows: dict[tuple[int, ...], None] = {}
    while len(rows) < count:
        rows[tuple(rng.integers(0, 26, 5).tolist())] = None
    return [list(row) for row in rows]


def _listed(keys: Sequence[str]) -> str:
    return f"{', '.join(keys[:-1])}{',' if len(keys) > 2 else ''} and {keys[-1]}"
