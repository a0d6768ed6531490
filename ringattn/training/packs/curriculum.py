"""A curriculum of lengths: packs grow at given steps, so that most of a run does not pay for its longest documents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from ringattn.training.packs.ordering import AnyCorpus
from ringattn.training.packs.packing import PackPlan


class HasState(Protocol):
    """A place in the data."""

    def state_dict(self) -> dict[str, Any]:
        """What JSON can hold."""


class Stepwise(Protocol):
    """A stream of steps, whose packs may have other lengths from step to step."""

    seq_len: int
    corpus: AnyCorpus

    @property
    def position(self) -> HasState:
        """Where it stands."""

    @property
    def epoch(self) -> float:
        """Passes over the corpus."""

    def step(self, packs: int) -> tuple[PackPlan, ...]:
        """Plans the packs of one step and moves on."""


@dataclass(frozen=True)
class Curriculum:
    """Lengths of packs by step: ((0, 8192), (100, 65536)) has 8192 tokens in steps 0 to 99, and then 65536."""

    lengths: tuple[tuple[int, int], ...]

    def __call__(self, step: int) -> int:
        """Tokens of a pack in a step, which count from 0."""
        return next(length for first, length in reversed(self.lengths) if step >= first)

    @property
    def longest(self) -> int:
        """The most tokens that a pack has at any time: what memory is planned for."""
        return max(length for _, length in self.lengths)

    def tokens(self, steps: int, packs: int) -> int:
        """Tokens of all packs of a run of so many steps."""
        ends = [first for first, _ in self.lengths[1:]] + [max(steps, self.lengths[-1][0])]
        pairs = zip(self.lengths, ends, strict=True)
        return packs * sum(max(0, min(end, steps) - first) * length for (first, length), end in pairs)


def curriculum_of(values: Any) -> Curriculum:
    """A curriculum from the plain lists of `data.curriculum`. Raises ValueError that says what is wrong."""
    example = "data.curriculum=[[0, 8192], [100, 65536]]"
    good = isinstance(values, Sequence) and not isinstance(values, str) and values
    pairs = list(values) if good else []
    for pair in pairs:
        if not (isinstance(pair, Sequence) and len(pair) == 2 and all(_integer(one) for one in pair) and pair[1] >= 1):
            raise ValueError(f"data.curriculum must hold pairs of a step and a length, got {pair!r}; write {example}")
    if not pairs or pairs[0][0] != 0:
        raise ValueError(f"data.curriculum must be a list that begins with step 0, got {values!r}; write {example}")
    steps = [step for step, _ in pairs]
    if any(one >= other for one, other in pairwise(steps)):
        raise ValueError(f"data.curriculum must have its steps in order, each once, got {', '.join(map(str, steps))}")
    return Curriculum(tuple((step, length) for step, length in pairs))


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(frozen=True)
class CurriculumPosition:
    """Where a stream with a curriculum stands: in the data, and in how many steps of it were drawn."""

    stream: HasState
    step: int

    def state_dict(self) -> dict[str, Any]:
        """That of the stream, and the step."""
        return self.stream.state_dict() | {"step": self.step}


class CurriculumPacker:
    """A packer whose packs have the length of their step."""

    def __init__(self, packer: Stepwise, curriculum: Curriculum, step: int = 0) -> None:
        self._packer, self._curriculum, self._step = packer, curriculum, step

    @property
    def corpus(self) -> AnyCorpus:
        """The documents."""
        return self._packer.corpus

    @property
    def seq_len(self) -> int:
        """Tokens of a pack of the next step."""
        return self._curriculum(self._step)

    @property
    def position(self) -> CurriculumPosition:
        """Where the stream stands."""
        return CurriculumPosition(self._packer.position, self._step)

    @property
    def epoch(self) -> float:
        """Passes over the corpus so far."""
        return self._packer.epoch

    def step(self, packs: int) -> tuple[PackPlan, ...]:
        """Plans the packs of one step and moves on."""
        self._packer.seq_len = self._curriculum(self._step)
        plans = self._packer.step(packs)
        self._step += 1
        return plans


def step_of(state: Mapping[str, Any]) -> int:
    """The steps of data that were drawn, by a state."""
    return int(state.get("step", 0))
