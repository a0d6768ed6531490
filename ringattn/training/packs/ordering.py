"""In which order the documents of a corpus are read: shuffled, mixed by weights, or as a stream; and where it stands.

An order is a cursor: `peek` says which document comes next, and how far it is read, and `take` moves on. The place is
a few integers, and the rest follows from the seed: any number of ranks goes on from there alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ringattn.training.data.corpus import Corpus
from ringattn.training.data.mixture import MixedCorpus
from ringattn.training.data.streaming import StreamedCorpus, StreamedSource

AnyCorpus = Corpus | MixedCorpus | StreamedCorpus


@dataclass(frozen=True)
class Position:
    """Where the stream stands, before its next token.

    Arguments:
        epoch: passes over the corpus that are complete.
        index: documents of this epoch's order that are used up.
        offset: tokens of the next document that are used up.
    """

    epoch: int = 0
    index: int = 0
    offset: int = 0

    def state_dict(self) -> dict[str, int]:
        """Three small integers."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Position":
        """The inverse of `state_dict`.

        Raises ValueError for the state of a grouped stream with documents that wait: they would be dropped.
        """
        if waiting := [*state.get("rest", ()), *state.get("unusual", ()), *state.get("waiting", ())]:
            raise ValueError(
                f"the checkpoint has {len(waiting)} documents that wait for their pack, and without data.delay or "
                "data.packing=best_fit they would be dropped: set it as it was"
            )
        return cls(**{key: int(state[key]) for key in ("epoch", "index", "offset")})


@dataclass(frozen=True)
class MixedPosition:
    """Where a mixture stands.

    Arguments:
        parts: the place in each source.
        drawn: tokens drawn from each so far.
        epoch: passes that all sources have done.
    """

    parts: tuple[tuple[int, ...], ...]
    drawn: tuple[int, ...]
    epoch: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Integers in lists; `epoch` alone is enough to begin one anew."""
        sources = [list(part) for part in self.parts]
        return {"epoch": self.epoch, "index": 0, "offset": 0, "sources": sources, "drawn": list(self.drawn)}


Place = Position | MixedPosition


def place_of(state: Mapping[str, Any]) -> Place:
    """The place in a state, without what waits there."""
    if "sources" not in state:
        return Position(*(int(state[key]) for key in ("epoch", "index", "offset")))
    parts = tuple(tuple(int(one) for one in part) for part in state["sources"])
    return MixedPosition(parts, tuple(int(one) for one in state["drawn"]), int(state["epoch"]))


class Next(NamedTuple):
    """The document that comes next: its number, its tokens, and how many of them are used up."""

    document: int
    length: int
    offset: int


class Order(Protocol):
    """A cursor over documents."""

    @property
    def position(self) -> Place:
        """Where it stands, before the next token."""

    @property
    def passes(self) -> float:
        """Passes over the corpus so far, by tokens where they are known."""

    def peek(self) -> Next | None:
        """What comes next; None if all sources are used up."""

    def take(self, tokens: int) -> None:
        """So many tokens of the next document are used."""


class Shuffled:
    """All documents of a corpus, in an order that is drawn anew for every epoch; empty ones are passed over.

    Arguments:
        first: number of the corpus' first document among all.
        stream: of the random numbers; those of a corpus alone are of stream 0.
        epochs: after so many it ends; None: never.
    """

    def __init__(
        self,
        corpus: Corpus,
        seed: int,
        position: Position | None = None,
        first: int = 0,
        stream: int = 0,
        epochs: int | None = None,
    ) -> None:
        self.corpus, self.seed, self.first, self.stream, self.epochs = corpus, seed, first, stream, epochs
        self._position = position or Position()
        self._order_of: tuple[int, npt.NDArray[np.int64]] | None = None
        self._before: tuple[int, npt.NDArray[np.int64]] | None = None
        at = self._position
        if not 0 <= at.index <= len(corpus) or not 0 <= at.offset <= self._open_length():
            raise ValueError(f"{at} is no place in this corpus of {len(corpus)} documents")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_order_of": None, "_before": None}  # as large as the corpus has documents

    @property
    def position(self) -> Position:
        return self._position

    @property
    def state(self) -> tuple[int, ...]:
        return self._position.epoch, self._position.index, self._position.offset

    @property
    def passes(self) -> float:
        at = self._position
        if self._before is None or self._before[0] != at.epoch:
            ordered = self.corpus.lengths[self._order(at.epoch)]
            self._before = (at.epoch, np.concatenate([[0], np.cumsum(ordered)]))
        return at.epoch + (int(self._before[1][at.index]) + at.offset) / self.corpus.total

    def peek(self) -> Next | None:
        epoch, index, offset = self.state
        order = self._order(epoch)
        while index == len(order) or self.corpus.length(int(order[index])) == 0:
            epoch, index = (epoch + 1, 0) if index == len(order) else (epoch, index + 1)
            if self.epochs is not None and epoch >= self.epochs:
                return None
            order = self._order(epoch)
        if self.epochs is not None and epoch >= self.epochs:
            return None
        document = int(order[index])
        self._ahead = epoch, index, self.corpus.length(document)
        return Next(self.first + document, self._ahead[2], offset)

    def take(self, tokens: int) -> None:
        epoch, index, length = self._ahead
        stop = self._position.offset + tokens
        self._position = Position(epoch, index + 1, 0) if stop == length else Position(epoch, index, stop)

    def _open_length(self) -> int:
        """Tokens of the document that comes next, 0 at the end of an epoch."""
        order = self._order(self._position.epoch)
        return self.corpus.length(int(order[self._position.index])) if self._position.index < len(order) else 0

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._order_of is None or self._order_of[0] != epoch:
            random = np.random.default_rng([self.seed, epoch, self.stream])
            self._order_of = (epoch, random.permutation(len(self.corpus)))
        return self._order_of[1]


class Mixed:
    """Several orders, mixed by weights: the next document is of the source that is furthest behind its share.

    So a source is ahead of its share by one document at most, at any time. One that is used up no longer takes part.

    Arguments:
        total: tokens of all sources; None where nobody knows.
        drawn: tokens drawn from each so far.
    """

    def __init__(
        self,
        orders: Sequence[Shuffled | StreamedSource],
        weights: Sequence[float],
        total: int | None,
        drawn: Sequence[int] = (),
    ) -> None:
        self.orders, self.weights, self.total = list(orders), list(weights), total
        self.drawn = list(drawn) or [0] * len(self.orders)
        self._at = 0

    @property
    def position(self) -> MixedPosition:
        states = tuple(order.state for order in self.orders)
        return MixedPosition(states, tuple(self.drawn), min(state[0] for state in states))

    @property
    def passes(self) -> float:
        return sum(self.drawn) / self.total if self.total else min(order.passes for order in self.orders)

    def peek(self) -> Next | None:
        best: tuple[float, int, Next] | None = None
        for number, order in enumerate(self.orders):
            found = order.peek()
            if found is None:
                continue
            # A document that is begun goes on, whatever the shares.
            behind = -1.0 if found[2] else self.drawn[number] / self.weights[number]
            if best is None or (behind, number) < best[:2]:
                best = behind, number, Next(*found)
        if best is None:
            return None
        self._at = best[1]
        return best[2]

    def take(self, tokens: int) -> None:
        self.orders[self._at].take(tokens)
        self.drawn[self._at] += tokens


def order_of(corpus: AnyCorpus, seed: int, place: Place | None) -> Order:
    """The order of a corpus' documents, from a place on; that of a plain corpus' epoch begins a mixture there.

    Raises ValueError for a place that is of other sources.
    """
    if isinstance(corpus, Corpus):
        if isinstance(place, MixedPosition):
            raise ValueError("the checkpoint stands in a mixture of sources, and data has a single corpus now")
        return Shuffled(corpus, seed, place)
    count = len(corpus.parts)
    begin = place.epoch if isinstance(place, Position) else 0
    states = place.parts if isinstance(place, MixedPosition) else ((begin,),) * count
    drawn = place.drawn if isinstance(place, MixedPosition) else (0,) * count
    size = 3 if isinstance(corpus, MixedCorpus) else 5
    if len(states) != count or any(len(state) not in (1, size) for state in states):
        raise ValueError("the checkpoint stands in other sources, or data.streaming was another; set them as they were")
    orders: list[Shuffled | StreamedSource] = []
    for number in range(count):
        if isinstance(corpus, MixedCorpus):
            part, first = corpus.parts[number], int(corpus.firsts[number])
            orders.append(Shuffled(part.corpus, seed, Position(*states[number]), first, number, part.epochs))
        else:
            orders.append(corpus.cursor(number, seed, states[number]))
    total = corpus.total if isinstance(corpus, MixedCorpus) else None
    return Mixed(orders, [part.weight for part in corpus.parts], total, drawn)
