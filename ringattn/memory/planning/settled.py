"""Ways to run that were looked at, with what each takes."""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from ringattn.memory.planning.alive import Alive
from ringattn.memory.planning.limits import Limits
from ringattn.memory.planning.step_time import StepTime
from ringattn.memory.settings import MemorySettings, StateSettings


@dataclass(frozen=True)
class Settled:
    """One way to run, with what it takes.

    Arguments:
        pinned: bytes of pinned memory that were asked for, if any were.
    """

    alive: Alive
    time: StepTime
    limits: Limits
    pinned: int | None = None

    @cached_property
    def lacking(self) -> str:
        """Why it does not fit, or ""."""
        needed = self.alive.layers.host_bytes
        if self.pinned is not None and needed > self.pinned:
            return f"{needed} bytes of pinned memory, host_bytes={self.pinned} are asked for"
        return self.limits.lacking(self.alive)

    @property
    def size(self) -> int:
        """Bytes of both memories."""
        return self.alive.peak().total + sum(self.alive.host.values())

    @property
    def memory(self) -> MemorySettings:
        return self.alive.memory

    @property
    def states(self) -> StateSettings:
        return self.alive.states

    @property
    def values(self) -> dict[str, Any]:
        """All fields of both records."""
        return {one.name: getattr(part, one.name) for part in (self.memory, self.states) for one in fields(part)}


@dataclass(frozen=True)
class Alternative:
    """Another value of one field, the others as chosen, and why it was not taken."""

    key: str
    value: Any
    settled: Settled
    reason: str
