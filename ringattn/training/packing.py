"""Packs of exactly `seq_len` tokens from a shuffled, endless stream of documents.

Nothing is lost, and nothing padded unless asked. A pack is planned from document lengths alone, so every rank plans the
packs of all replicas and reads only its own.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ringattn.documents import Documents
from ringattn.training.corpus import Corpus

NO_TARGET = -100


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
        if waiting := [*state.get("rest", ()), *state.get("unusual", ())]:
            raise ValueError(
                f"the checkpoint has {len(waiting)} documents that wait for their pack, and without data.delay they "
                "would be dropped: set it as it was"
            )
        return cls(**{key: int(state[key]) for key in ("epoch", "index", "offset")})


@dataclass(frozen=True)
class Segment:
    """Tokens `[start, stop)` of one document of the corpus; `ends` says that the document ends with them."""

    document: int
    start: int
    stop: int
    ends: bool


@dataclass(frozen=True)
class PackPlan:
    """What one pack holds: its segments in order, then padding up to `seq_len` tokens. Integers only."""

    segments: tuple[Segment, ...]
    seq_len: int

    @cached_property
    def docs(self) -> Documents:
        """The pack's documents: every segment attends only inside itself."""
        return Documents([segment.stop - segment.start for segment in self.segments], total=self.seq_len)

    @property
    def tokens(self) -> int:
        """Tokens without the padding."""
        return sum(segment.stop - segment.start for segment in self.segments)

    @property
    def targets(self) -> int:
        """Tokens that have a next token to predict: all but the true last one of each document."""
        return self.tokens - sum(segment.ends for segment in self.segments)


@dataclass(frozen=True)
class Pack:
    """A pack with its tokens.

    Arguments:
        tokens: (T,) int64, padding is 0.
        labels: (T,) int64, already shifted: the next token of the same document, or -100 where there is none.
        docs: the documents of the pack.
        targets: number of labels that are not -100.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    docs: Documents
    targets: int


def read_pack(plan: PackPlan, corpus: Corpus) -> Pack:
    """Reads the tokens and labels of a planned pack.

    Where a document is cut by the end of the pack, the label of its last token here is the true next token, which opens
    the next pack: no target is lost.
    """
    tokens = np.zeros(plan.seq_len, np.int64)
    labels = np.full(plan.seq_len, NO_TARGET, np.int64)
    begin = 0
    for segment in plan.segments:
        size = segment.stop - segment.start
        known = corpus.read(segment.document, segment.start, segment.stop + (not segment.ends))
        tokens[begin : begin + size] = known[:size]
        labels[begin : begin + len(known) - 1] = known[1:]
        begin += size
    return Pack(torch.from_numpy(tokens), torch.from_numpy(labels), plan.docs, plan.targets)


class Packer:
    """An endless stream of pack plans over a corpus, in an order that depends only on `seed`.

    Arguments:
        corpus: documents; empty ones are passed over.
        seq_len: tokens of a pack.
        seed: of the order of documents, which is drawn anew for every epoch.
        pad: keep a document whole, if a pack can hold it, and pad the rest of the pack before it. By default nothing is
            padded and the document is split, its rest opening the next pack.
        position: where to go on.

    Raises ValueError for an empty corpus, seq_len < 1 or a position that is not in the corpus.
    """

    def __init__(
        self, corpus: Corpus, seq_len: int, seed: int, pad: bool = False, position: Position | None = None
    ) -> None:
        if corpus.total == 0:
            raise ValueError("the corpus has no token: every document is empty")
        if seq_len < 1:
            raise ValueError(f"seq_len must be >= 1, got {seq_len}")
        self.corpus, self.seq_len, self.seed, self.pad = corpus, seq_len, seed, pad
        self.position = position or Position()
        self._order_of: tuple[int, npt.NDArray[np.int64]] | None = None
        self._before: tuple[int, npt.NDArray[np.int64]] | None = None
        if not 0 <= self.position.index <= len(corpus) or not 0 <= self.position.offset <= self._open_length():
            raise ValueError(f"{self.position} is no place in this corpus of {len(corpus)} documents")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_order_of": None, "_before": None}  # as large as the corpus has documents

    @property
    def epoch(self) -> float:
        """Passes over the corpus so far, by tokens, as in 1.25."""
        at = self.position
        if self._before is None or self._before[0] != at.epoch:
            ordered = np.diff(self.corpus.offsets)[self._order(at.epoch)]
            self._before = (at.epoch, np.concatenate([[0], np.cumsum(ordered)]))
        return at.epoch + (int(self._before[1][at.index]) + at.offset) / self.corpus.total

    def _open_length(self) -> int:
        """Tokens of the document that comes next, 0 at the end of an epoch."""
        order = self._order(self.position.epoch)
        return self.corpus.length(int(order[self.position.index])) if self.position.index < len(order) else 0

    def next(self) -> PackPlan:
        """Plans the next pack and moves on."""
        segments: list[Segment] = []
        room = self.seq_len
        while room > 0:
            segment = self.draw(room)
            if segment is None:
                break
            segments.append(segment)
            room -= segment.stop - segment.start
        return PackPlan(tuple(segments), self.seq_len)

    def step(self, packs: int) -> tuple[PackPlan, ...]:
        """Plans the packs of one step and moves on."""
        return tuple(self.next() for _ in range(packs))

    def draw(self, room: int) -> Segment | None:
        """The next segment of at most `room` tokens, or None if its document should open the next pack."""
        epoch, index, offset = self.position.epoch, self.position.index, self.position.offset
        order = self._order(epoch)
        while index == len(order) or self.corpus.length(int(order[index])) == 0:
            epoch, index = (epoch + 1, 0) if index == len(order) else (epoch, index + 1)
            order = self._order(epoch)
        document = int(order[index])
        length = self.corpus.length(document)
        if self.pad and offset == 0 and room < length <= self.seq_len:
            return None
        stop = min(length, offset + room)
        ends = stop == length
        self.position = Position(epoch, index + 1, 0) if ends else Position(epoch, index, stop)
        return Segment(document, offset, stop, ends)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._order_of is None or self._order_of[0] != epoch:
            self._order_of = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.corpus)))
        return self._order_of[1]
