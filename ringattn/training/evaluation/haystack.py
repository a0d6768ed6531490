"""Texts to hide something in: sentences of given texts, or of made-up words, as token ids.

Every sentence is tokenized by itself, so that a haystack of any length is a matter of counting, and whatever is put
between two sentences is tokenized the same wherever it stands.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ringattn.training.data.tokenizer import Tokenizer

Ids = npt.NDArray[np.int64]
Encode = Callable[[str], Ids]

_ONSETS = ["b", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z"]
_VOWELS = ["a", "e", "i", "o", "u"]


def made_up_words(count: int, seed: int, syllables: int = 2) -> list[str]:
    """Different words such as `kalo`, in an order that depends on the seed alone. Raises ValueError for too many."""
    known = [onset + vowel for onset in _ONSETS for vowel in _VOWELS]
    most = len(known) ** syllables
    if count > most:
        raise ValueError(f"there are {most} words of {syllables} syllables, got {count}")
    numbers = np.random.default_rng([seed, syllables]).permutation(most)[:count].tolist()
    return [
        "".join(known[number // len(known) ** place % len(known)] for place in range(syllables)) for number in numbers
    ]


def made_up_sentences(count: int = 16, words: int = 6, seed: int = 0) -> list[str]:
    """Different sentences of made-up words of three syllables, ` soruba temika ... .`, each beginning with a space."""
    known = made_up_words(count * words, seed, 3)
    return [f" {' '.join(known[first : first + words])}." for first in range(0, len(known), words)]


def sentences_of(texts: Iterable[str]) -> list[str]:
    """The sentences of texts, each after a space; line ends become spaces, long sentences are cut at 200 letters."""
    found = []
    for text in texts:
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
            found += [f" {sentence[first : first + 200].strip()}" for first in range(0, len(sentence), 200)]
    return [sentence for sentence in found if sentence.strip()]


def encoder(tokenizer: Tokenizer) -> Encode:
    """A tokenizer as a function from text to ids (n,)."""

    def encode(text: str) -> Ids:
        parts = [np.asarray(ids, np.int64) for ids, _ in tokenizer.pieces(text)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    return encode


@dataclass(frozen=True)
class Haystack:
    """Sentences as token ids; a haystack is made of them in their order, from a drawn one on, again and again."""

    sentences: tuple[Ids, ...]

    @classmethod
    def of(cls, sentences: Sequence[str], encode: Encode) -> "Haystack":
        """Raises ValueError where there is no sentence with a token."""
        encoded = tuple(ids for ids in map(encode, sentences) if len(ids))
        if not encoded:
            raise ValueError("a haystack needs at least one sentence, got none")
        return cls(encoded)

    def fill(self, room: int, rng: np.random.Generator) -> list[Ids]:
        """Sentences of `room` tokens in all at most, as many as there is room for."""
        at = int(rng.integers(len(self.sentences)))
        found = []
        while len(sentence := self.sentences[at % len(self.sentences)]) <= room:
            found.append(sentence)
            room -= len(sentence)
            at += 1
        return found
