"""What came of a simulated pass: who did what from when to when. Pure."""

from dataclasses import dataclass
from functools import cached_property

PASSES = {"forward": False, "backward": True}  # by name, whether it is the backward one


@dataclass(frozen=True)
class Span:
    """What a rank does from `begin` to `end`, seconds: "compute", "cast", "reduce", "exchange" or "states", of which
    stage and chunk of heads."""

    rank: int
    kind: str
    stage: int
    begin: float
    end: float
    chunk: int = 0


@dataclass(frozen=True)
class Pass:
    """One pass of all ranks."""

    ranks: int
    spans: tuple[Span, ...]

    @property
    def seconds(self) -> float:
        """Until the last rank is done."""
        return max((span.end for span in self.spans), default=0.0)

    def busy(self, kind: str) -> list[float]:
        """Seconds that each rank spends on one kind."""
        return [sum(span.end - span.begin for span in spans if span.kind == kind) for spans in self.by_rank]

    @property
    def ends(self) -> list[float]:
        """When each rank is done."""
        return [max((span.end for span in spans), default=0.0) for spans in self.by_rank]

    @cached_property
    def by_rank(self) -> list[list[Span]]:
        """The spans of each rank, by their beginning."""
        out: list[list[Span]] = [[] for _ in range(self.ranks)]
        for span in self.spans:
            out[span.rank].append(span)
        return out
