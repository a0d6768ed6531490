"""Several sources as one corpus: documents are counted through, and each part says how much of it is wanted."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ringattn.training.data.corpus import Corpus


@dataclass(frozen=True)
class Part:
    """One source of a mixture.

    Arguments:
        name: for people.
        corpus: its documents, after its cap.
        weight: share of the mixture's tokens, relative to the other parts, while it takes part.
        epochs: passes after which it no longer does; None: no limit.
    """

    name: str
    corpus: Corpus
    weight: float
    epochs: int | None = None


@dataclass(frozen=True)
class MixedCorpus:
    """The documents of all parts, numbered through.

    Arguments:
        notes: what people should know of them.
    """

    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def firsts(self) -> npt.NDArray[np.int64]:
        """(parts + 1,) number of each part's first document; the last one is their count."""
        return np.cumsum([0, *(len(part.corpus) for part in self.parts)])

    @cached_property
    def vocab_size(self) -> int:
        """Every id is smaller than this."""
        return max(part.corpus.vocab_size for part in self.parts)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the documents, with what of them is learned, and with how much of each part is wanted."""
        facts = [[one.corpus.fingerprint, len(one.corpus), one.weight, one.epochs] for one in self.parts]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(documents,) tokens of each."""
        return np.concatenate([part.corpus.lengths for part in self.parts])

    @property
    def total(self) -> int:
        """Tokens of all parts, each once."""
        return sum(part.corpus.total for part in self.parts)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(part.corpus.longest for part in self.parts)

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def part_of(self, document: int) -> tuple[Part, int]:
        """The part that a document is in, and its number there."""
        at = int(np.searchsorted(self.firsts, document, side="right")) - 1
        return self.parts[at], document - int(self.firsts[at])

    def length(self, document: int) -> int:
        """Tokens of one document."""
        part, own = self.part_of(document)
        return part.corpus.length(own)

    def read(self, document: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens `[start, stop)` of one document, (stop - start,) int64."""
        part, own = self.part_of(document)
        return part.corpus.read(own, start, stop)

    def learned(self, document: int, start: int, stop: int) -> npt.NDArray[np.bool_] | None:
        """Which of the tokens `[start, stop)` of one document may be targets, (stop - start,); None: all."""
        part, own = self.part_of(document)
        return part.corpus.learned(own, start, stop)

    def available(self) -> float:
        """Tokens that may be drawn: infinite if a part has no limit of epochs."""
        limits = [part.corpus.total * part.epochs if part.epochs else float("inf") for part in self.parts]
        return sum(limits)


CachedCorpus = Corpus | MixedCorpus


def capped(corpus: Corpus, max_tokens: int | None) -> Corpus:
    """The first documents of a corpus that have at most so many tokens together; all of them without a number.

    Raises ValueError if the first document alone has more.
    """
    if max_tokens is None or corpus.total <= max_tokens:
        return corpus
    count = int(np.searchsorted(corpus.offsets, max_tokens, side="right")) - 1
    if not corpus.offsets[count]:
        first = int(corpus.offsets[corpus.offsets > 0][0])
        raise ValueError(f"max_tokens={max_tokens:,} is less than the first document, which has {first:,}")
    digests = None if corpus.digests is None else corpus.digests[:count]
    return replace(corpus, offsets=corpus.offsets[: count + 1], digests=digests)


def weights_of(given: Sequence[float | None], sizes: Sequence[float]) -> list[float]:
    """The weights of parts: those given, or their sizes, so that all would end together."""
    return [size if weight is None else weight for weight, size in zip(given, sizes, strict=True)]
