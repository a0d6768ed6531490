"""Packs filled by best fit: with those of the documents that wait which fill a pack best, so that few are cut.

Nothing is lost: a document that fits nowhere waits, and every pack begins with the one that has waited longest, so that
nobody waits for more packs than there are places to wait. That documents are to be chosen so that packs cut few of them
is Ding et al.'s (2024, arXiv 2404.10830). They take the longest that fits the room, again and again, which leaves a
little room in each pack that is padded. Here the sums of all sets that wait are looked at: one fills the room exactly,
as a rule.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from ringattn.training.data.corpus import Corpus
from ringattn.training.data.mixture import MixedCorpus
from ringattn.training.packs.ordering import AnyCorpus, Place, Position, place_of
from ringattn.training.packs.packing import Packer, PackPlan, Segment, used_up


@dataclass(frozen=True)
class BestFitPosition:
    """Where a stream with waiting documents stands: the stream, and who waits, the oldest first."""

    stream: Place = field(default_factory=Position)
    waiting: tuple[Segment, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """Integers in lists: JSON can hold it."""
        return {**self.stream.state_dict(), "waiting": [list(asdict(one).values()) for one in self.waiting]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "BestFitPosition":
        """The inverse of `state_dict`; in the state of a stream in order nobody waits.

        Raises ValueError for documents that wait by another rule: they would be dropped.
        """
        Position.from_state({**state, "waiting": ()})
        waiting = tuple(Segment(a, b, c, bool(ends)) for a, b, c, ends in state.get("waiting", ()))
        return cls(place_of(state), waiting)


class BestFitPacker:
    """An endless stream of packs that cut as few documents as can be; depends only on `seed`.

    Arguments:
        corpus, seq_len, seed: as for `Packer`.
        lookahead: documents that may wait, >= 1; a document waits for so many packs at most. No more wait than a
            corpus has that are not empty, or documents of many passes would wait together.
        pad: no document that a pack can hold is cut: room that none fits is padding. By default a document is cut to
            fill it, the longest that waits, and its rest waits on.
        position: where to go on.
    """

    def __init__(
        self,
        corpus: AnyCorpus,
        seq_len: int,
        seed: int,
        lookahead: int,
        pad: bool = False,
        position: BestFitPosition | None = None,
    ) -> None:
        if lookahead < 1:
            raise ValueError(f"lookahead must be >= 1, got {lookahead}")
        position = position or BestFitPosition()
        self._stream = Packer(corpus, seq_len, seed, position=position.stream)
        known = np.count_nonzero(corpus.lengths) if isinstance(corpus, Corpus | MixedCorpus) else lookahead
        self.corpus, self.seq_len, self.lookahead, self.pad = corpus, seq_len, min(lookahead, int(known)), pad
        self._waiting = list(position.waiting)

    @property
    def position(self) -> BestFitPosition:
        """Where the stream stands."""
        return BestFitPosition(self._stream.position, tuple(self._waiting))

    @property
    def epoch(self) -> float:
        """Passes over the corpus so far, without what was read and waits."""
        total = getattr(self.corpus, "total", None)
        waiting = sum(_size(one) for one in self._waiting) / total if total else 0.0
        return self._stream.epoch - waiting

    def step(self, packs: int) -> tuple[PackPlan, ...]:
        """Plans the packs of one step and moves on."""
        return tuple(self.next() for _ in range(packs))

    def next(self) -> PackPlan:
        """Plans the next pack and moves on. Raises ValueError where all sources are used up."""
        segments: list[Segment] = []
        room = self.seq_len
        while room:
            self._read()
            chosen = fullest([_size(one) for one in self._waiting], room) if segments else [0][: len(self._waiting)]
            if not chosen and (at := _longest(self._waiting)) is not None:
                # All that wait are too long. With padding only those are cut that no pack can hold.
                chosen = [at] if not self.pad or _size(self._waiting[at]) > self.seq_len else []
            if not chosen:
                break
            for at in reversed(chosen):
                segments.append(self._take(at, room))
                room -= _size(segments[-1])
        if not segments or (room and not self.pad):
            raise used_up()
        return PackPlan(tuple(segments), self.seq_len)

    def _read(self) -> None:
        """Documents wait, as many as there are places, unless the sources are used up."""
        while len(self._waiting) < self.lookahead and (found := self._stream.order.peek()) is not None:
            self._waiting.append(self._stream.taken(found, found.length))

    def _take(self, at: int, room: int) -> Segment:
        one = self._waiting.pop(at)
        middle = one.start + room
        if middle >= one.stop:
            return one
        self._waiting.insert(at, replace(one, start=middle))
        return replace(one, stop=middle, ends=False)


def fullest(sizes: Sequence[int], room: int) -> list[int]:
    """Which of some sizes together come nearest to `room` without going beyond: their places, in order.

    Of those that come equally near, ones with the largest sizes. The sums that can be had are the bits of an integer,
    one more size shifts them: this takes some milliseconds for hundreds of sizes and a million tokens.
    """
    places = sorted((at for at, size in enumerate(sizes) if size <= room), key=lambda at: (sizes[at], -at))
    sums, mask = [1], (1 << (room + 1)) - 1
    for at in places:
        sums.append((sums[-1] | (sums[-1] << sizes[at])) & mask)
    missing, chosen = sums[-1].bit_length() - 1, []
    for number in range(len(places), 0, -1):
        size = sizes[places[number - 1]]
        if size <= missing and sums[number - 1] >> (missing - size) & 1:
            chosen.append(places[number - 1])
            missing -= size
    return sorted(chosen)


def _size(segment: Segment) -> int:
    return segment.stop - segment.start


def _longest(waiting: Sequence[Segment]) -> int | None:
    return max(range(len(waiting)), key=lambda at: (_size(waiting[at]), -at), default=None)
