"""Packs of exactly `seq_len` tokens from a shuffled, endless stream of documents.

Nothing is lost, and nothing padded unless asked. A pack is planned from document lengths alone, so every rank plans the
packs of all replicas and reads only its own.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from ringattn.documents import Documents
from ringattn.training.packs.ordering import AnyCorpus, Next, Place, order_of

NO_TARGET = -100


@dataclass(frozen=True)
class Segment:
    """Tokens `[start, stop)` of one document of the corpus; `ends` says that the document ends with them."""

    document: int
    start: int
    stop: int
    ends: bool


@dataclass(frozen=True)
class PackPlan:
    """What one pack holds: its segments in order, then padding up to `seq_len` tokens. Integers only.

    Arguments:
        learned: how many targets there are, where not every token is learned; see `counted`.
        shared: common prefixes of its documents are computed once; then there is no padding either.
    """

    segments: tuple[Segment, ...]
    seq_len: int
    learned: int | None = None
    shared: bool = False

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
        """Tokens that have a next token to predict: all but the true last one of each document, as far as it is
        learned."""
        if self.learned is not None:
            return self.learned
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


def counted(plan: PackPlan, corpus: AnyCorpus) -> PackPlan:
    """The plan with the number of its targets, which depends on what is learned of its documents."""
    if plan.learned is not None:
        return plan
    learned = [learned_targets(segment, corpus) for segment in plan.segments]
    if all(one is None for one in learned):
        return plan
    pairs = zip(plan.segments, learned, strict=True)
    return replace(plan, learned=sum(_targets(segment) if one is None else int(one.sum()) for segment, one in pairs))


def _targets(segment: Segment) -> int:
    return segment.stop - segment.start - segment.ends


def learned_targets(segment: Segment, corpus: AnyCorpus) -> "np.ndarray[tuple[int], np.dtype[np.bool_]] | None":
    """Which of the tokens that come after a segment's tokens are learned; None: all."""
    return corpus.learned(segment.document, segment.start + 1, segment.stop + (not segment.ends))


def read_pack(plan: PackPlan, corpus: AnyCorpus) -> Pack:
    """Reads the tokens and labels of a planned pack.

    Where a document is cut by the end of the pack, the label of its last token here is the true next token, which opens
    the next pack: no target is lost. What is not learned is no target.
    """
    plan = counted(plan, corpus)
    tokens = np.zeros(plan.seq_len, np.int64)
    labels = np.full(plan.seq_len, NO_TARGET, np.int64)
    begin = 0
    for segment in plan.segments:
        size = segment.stop - segment.start
        known = corpus.read(segment.document, segment.start, segment.stop + (not segment.ends))
        tokens[begin : begin + size] = known[:size]
        learned = learned_targets(segment, corpus)
        labels[begin : begin + len(known) - 1] = (
            known[1:] if learned is None else np.where(learned, known[1:], NO_TARGET)
        )
        begin += size
    return Pack(torch.from_numpy(tokens), torch.from_numpy(labels), plan.docs, plan.targets)


class Packer:
    """An endless stream of pack plans over a corpus, in an order that depends only on `seed`.

    Arguments:
        corpus: documents; empty ones are passed over.
        seq_len: tokens of a pack; it may be changed between steps.
        seed: of the order of documents, which is drawn anew for every epoch.
        pad: keep a document whole, if a pack can hold it, and pad the rest of the pack before it. By default nothing is
            padded and the document is split, its rest opening the next pack.
        position: where to go on.

    Raises ValueError for an empty corpus, seq_len < 1 or a position that is not in the corpus.
    """

    def __init__(
        self, corpus: AnyCorpus, seq_len: int, seed: int, pad: bool = False, position: Place | None = None
    ) -> None:
        if getattr(corpus, "total", 1) == 0:
            raise ValueError("the corpus has no token: every document is empty")
        if seq_len < 1:
            raise ValueError(f"seq_len must be >= 1, got {seq_len}")
        self.corpus, self.seq_len, self.seed, self.pad = corpus, seq_len, seed, pad
        self.order = order_of(corpus, seed, position)

    @property
    def position(self) -> Place:
        """Where the stream stands."""
        return self.order.position

    @property
    def epoch(self) -> float:
        """Passes over the corpus so far, by tokens, as in 1.25."""
        return self.order.passes

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
        """The next segment of at most `room` tokens, or None if its document should open the next pack.

        Raises ValueError where all sources are used up.
        """
        found = self.order.peek()
        if found is None:
            raise used_up()
        if self.pad and found.offset == 0 and room < found.length <= self.seq_len:
            return None
        return self.taken(found, room)

    def taken(self, found: Next, room: int) -> Segment:
        """The next at most `room` tokens of the document that comes next."""
        stop = min(found.length, found.offset + room)
        self.order.take(stop - found.offset)
        return Segment(found.document, found.offset, stop, stop == found.length)


def used_up() -> ValueError:
    """What is said where every source has had its epochs."""
    return ValueError(
        "data.sources: all sources are used up; raise or leave out `epochs` of one, or use fewer run.steps"
    )
