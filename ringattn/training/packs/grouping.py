"""Packs of equal cost: documents are grouped so that all packs of a step have equal tokens *and* equal attention.

A step waits for its slowest pack, and attention grows with the square of a document's length, so equal tokens are not
enough. A document that alone costs more than the average pack waits until every pack of a step can have one like it
(the idea of outlier queues is WLB-LLM's, arXiv 2503.17924), at most `delay` steps. Nothing is dropped or padded.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from ringattn.training.data.mixture import CachedCorpus
from ringattn.training.packs.ordering import Place, Position, place_of
from ringattn.training.packs.packing import Packer, PackPlan, Segment

UNUSUAL = 0.1  # share of the average pack's attention from which on a document waits for others like it
LIKE = 1.15  # documents are alike up to this ratio of their lengths


@dataclass(frozen=True)
class DocumentCost:
    """What documents cost in a training step, in any unit.

    Arguments:
        attention: cost of a document's attention by its tokens; about L².
        per_token: cost of a token in everything else.
    """

    attention: Callable[[int], float]
    per_token: float = 0.0

    def __call__(self, lengths: Sequence[int]) -> float:
        return sum(map(self.attention, lengths)) + self.per_token * sum(lengths)


@dataclass(frozen=True)
class Waiting:
    """A segment that was read in step `read` and not yet packed."""

    segment: Segment
    read: int

    @property
    def tokens(self) -> int:
        return self.segment.stop - self.segment.start


@dataclass(frozen=True)
class GroupedPosition:
    """Where a grouped stream stands: the stream of documents, the steps done, and what was read but not yet packed.

    Arguments:
        rest: cut off by the end of the last step; it opens the next one.
        unusual: waits for others of its cost.
    """

    stream: Place = field(default_factory=Position)
    step: int = 0
    rest: tuple[Waiting, ...] = ()
    unusual: tuple[Waiting, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """Integers in lists: JSON can hold it."""
        waiting = {
            name: [[*asdict(one.segment).values(), one.read] for one in getattr(self, name)]
            for name in ("rest", "unusual")
        }
        return {**self.stream.state_dict(), "step": self.step, **waiting}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "GroupedPosition":
        """The inverse of `state_dict`; the state of a stream that is not grouped has nothing waiting.

        Raises ValueError for documents that wait by another rule: they would be dropped.
        """
        Position.from_state({"epoch": 0, "index": 0, "offset": 0, "waiting": state.get("waiting", ())})
        rest, unusual = (
            tuple(Waiting(Segment(a, b, c, bool(ends)), read) for a, b, c, ends, read in state.get(name, ()))
            for name in ("rest", "unusual")
        )
        return cls(place_of(state), int(state.get("step", 0)), rest, unusual)


class GroupedPacker:
    """An endless stream of steps whose packs have equal tokens and near equal cost; depends only on `seed`.

    Every segment that is read in step s is packed in step `s + delay + 1` at the latest; all but the unusually long
    ones, and what the end of a step cuts off, in step s.

    Arguments:
        corpus, seq_len, seed: as for `Packer`; a document longer than a pack is read in parts of `seq_len` tokens.
        cost: of documents.
        delay: steps that an unusually long document may wait for others of its kind, >= 0.
        position: where to go on.
    """

    def __init__(
        self,
        corpus: CachedCorpus,
        seq_len: int,
        seed: int,
        cost: DocumentCost,
        delay: int,
        position: GroupedPosition | None = None,
    ) -> None:
        if delay < 0:
            raise ValueError(f"delay must be >= 0, got {delay}")
        self.position = position or GroupedPosition()
        self._stream = Packer(corpus, seq_len, seed, position=self.position.stream)
        self.corpus, self.seq_len, self.cost, self.delay = corpus, seq_len, cost, delay
        self._usual = usual_attention(corpus, seq_len, cost)

    @property
    def epoch(self) -> float:
        """Passes over the corpus that were read so far, by tokens."""
        return self._stream.epoch

    def step(self, packs: int) -> tuple[PackPlan, ...]:
        """Plans the packs of one step, cheapest first, and moves on. Neighbours, which run together, cost alike."""
        position = self.position
        chosen, rest, unusual = self._read(packs, position)
        filled = fill([one.segment for one in chosen], [self.seq_len] * packs, self.cost.attention)
        plans = [PackPlan(tuple(segments), self.seq_len) for segments in filled]
        plans.sort(key=lambda plan: self.cost(plan.docs.lengths))
        self.position = GroupedPosition(self._stream.position, position.step + 1, rest, unusual)
        return tuple(plans)

    def _read(
        self, packs: int, position: GroupedPosition
    ) -> tuple[list[Waiting], tuple[Waiting, ...], tuple[Waiting, ...]]:
        """Segments of exactly `packs` packs, what is left of the last ones, and who waits."""
        missing = packs * self.seq_len
        chosen: list[Waiting] = []
        last, pool = list(position.rest), list(position.unusual)
        due, pool = self._due(packs, pool, position.step)
        while (more := _tokens(last)) < missing:
            chosen += last
            missing -= more
            if due:
                last, pool = _with_alike(due, pool, packs)
                due = []
                continue
            segment = self._stream.draw(self.seq_len)
            assert segment is not None, "an endless stream without padding"
            last = [Waiting(segment, position.step)]
            if len(pool) < packs * self.delay and self.cost.attention(last[0].tokens) > self._usual:
                last, pool = _alike([*pool, *last], packs)
        first, rest = _cut(last, missing)
        return chosen + first, tuple(rest), tuple(pool)

    def _due(self, packs: int, pool: list[Waiting], step: int) -> tuple[list[Waiting], list[Waiting]]:
        """Who must go now, the oldest, so that `packs` a step are enough for nobody to wait longer than `delay`."""
        oldest = sorted(pool, key=lambda one: one.read)
        late = [number + 1 - packs * (one.read + self.delay - step) for number, one in enumerate(oldest)]
        count = max([0, *late])
        return oldest[:count], oldest[count:]


def _alike(pool: list[Waiting], packs: int) -> tuple[list[Waiting], list[Waiting]]:
    """As many as there are packs, if so many are alike in length: they, and who still waits."""
    pool = sorted(pool, key=lambda one: one.tokens)
    windows = range(len(pool) - packs + 1)
    best = min(windows, key=lambda at: pool[at + packs - 1].tokens / pool[at].tokens, default=None)
    if best is None or pool[best + packs - 1].tokens > LIKE * pool[best].tokens:
        return [], pool
    return pool[best : best + packs], pool[:best] + pool[best + packs :]


def _with_alike(due: list[Waiting], pool: list[Waiting], packs: int) -> tuple[list[Waiting], list[Waiting]]:
    """Those that are due and, since these packs will be dear anyway, the most similar for the other packs."""
    longest = max(one.tokens for one in due)
    others = sorted(pool, key=lambda one: abs(one.tokens - longest))
    room = packs - len(due)
    return due + others[:room], others[room:]


def usual_attention(corpus: CachedCorpus, seq_len: int, cost: DocumentCost) -> float:
    """Attention cost above which one document alone makes its pack dearer than the average pack of the corpus."""
    lengths = corpus.lengths
    sizes, counts = np.unique(lengths % seq_len, return_counts=True)
    attention = int((lengths // seq_len).sum()) * cost.attention(seq_len)
    attention += sum(int(count) * cost.attention(int(size)) for size, count in zip(sizes, counts, strict=True))
    return UNUSUAL * attention * seq_len / corpus.total


def fill(
    segments: Sequence[Segment], tokens_of: Sequence[int], attention: Callable[[int], float]
) -> list[list[Segment]]:
    """Deal segments into packs of `tokens_of` tokens, which they fill exactly, with near equal attention per token.

    The dearest first, each to the cheapest pack that has room for it; where none has, one is cut. Only attention
    decides, since in the end every pack has its tokens and so the same other cost for each.
    Source: the longest-processing-time rule of Graham, 1969.
    """
    packs = len(tokens_of)
    out: list[list[Segment]] = [[] for _ in range(packs)]
    room, spent = list(tokens_of), [0.0] * packs
    heap = [(segment.start - segment.stop, number, segment) for number, segment in enumerate(segments)]
    heapq.heapify(heap)
    number = len(heap)
    while heap:
        _, _, segment = heapq.heappop(heap)
        tokens = segment.stop - segment.start
        fitting = [pack for pack in range(packs) if room[pack] >= tokens]
        if not fitting:
            pack = max(range(packs), key=lambda pack: room[pack])
            tokens = room[pack]
            middle = segment.start + tokens
            heapq.heappush(heap, (middle - segment.stop, number, replace(segment, start=middle)))
            number += 1
            segment = replace(segment, stop=middle, ends=False)
        else:
            pack = min(fitting, key=lambda pack: (spent[pack], -room[pack]))
        out[pack].append(segment)
        room[pack] -= tokens
        spent[pack] += attention(tokens) / tokens_of[pack]
    return out


def _tokens(waiting: Sequence[Waiting]) -> int:
    return sum(one.tokens for one in waiting)


def _cut(last: list[Waiting], tokens: int) -> tuple[list[Waiting], list[Waiting]]:
    """The first parts of some segments, `tokens` together and as equally long as can be, and what is left of them."""
    level, left = 0, tokens
    sizes = sorted(one.tokens for one in last)
    for index, size in enumerate(sizes):
        more = min(size - level, left // (len(sizes) - index))
        level, left = level + more, left - more * (len(sizes) - index)
        if level < size:
            break
    first, rest = [], []
    for one in last:
        part = min(one.tokens, level)
        if part < one.tokens and left:
            part, left = part + 1, left - 1
        middle = one.segment.start + part
        if part:
            first.append(replace(one, segment=replace(one.segment, stop=middle, ends=_ends(one, part))))
        if part < one.tokens:
            rest.append(replace(one, segment=replace(one.segment, start=middle)))
    return first, rest


def _ends(one: Waiting, part: int) -> bool:
    return one.segment.ends and part == one.tokens
