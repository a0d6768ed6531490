"""Of all settings that agree with what is asked for, the fastest that fit; and the longest length that fits.

What changes the numbers that a run computes (the dtypes of weights, moments and reductions) is never chosen, only asked
for; all else gives the same loss and gradients.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ringattn.memory.planning.alive import Alive
from ringattn.memory.planning.limits import Limits
from ringattn.memory.planning.planner import TRIED, Planner
from ringattn.memory.planning.refusal import AUTO, refusal
from ringattn.memory.planning.settled import Alternative, Settled
from ringattn.memory.planning.shapes import ModelShape, RunShape
from ringattn.memory.planning.step_time import StepTime
from ringattn.memory.planning.text import render
from ringattn.memory.planning.ways import NOTHING_FREE, FreeShape, Ways
from ringattn.memory.settings import MemorySettings, StateSettings
from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.machine.shipped import SHIPPED

KEYS = tuple(one.name for kind in (MemorySettings, StateSettings) for one in fields(kind))


@dataclass(frozen=True)
class Choice:
    """The settings of a run, what they take and why they were taken.

    Arguments:
        free: what of the run's shape was open; what was taken is in `plan.run`.
    """

    settled: Settled
    fixed: Mapping[str, Any]
    limits: Limits
    machine: Machine
    alternatives: tuple[Alternative, ...]
    free: FreeShape = NOTHING_FREE

    @property
    def memory(self) -> MemorySettings:
        return self.settled.memory

    @property
    def states(self) -> StateSettings:
        return self.settled.states

    @property
    def plan(self) -> Alive:
        """What is alive, by item."""
        return self.settled.alive

    @property
    def time(self) -> StepTime:
        return self.settled.time

    def smaller(self, room: float) -> tuple[str, Any, Settled] | None:
        """See `Planner.smaller`, from these settings."""
        return Planner(self.plan.model, self.plan.run, self.limits, self.machine).smaller(self.settled, room)

    def text(self) -> str:
        """For people: tables of memory and time, and the reasons."""
        asked = self.fixed if self.free.chunks else [*self.fixed, "head_chunks"]
        return render(self.settled, asked, self.limits, self.machine, self.alternatives)


def plan_run(
    model_shape: ModelShape,
    run_shape: RunShape,
    fixed: Mapping[str, Any],
    limits: Limits,
    machine: Machine = SHIPPED["H200"],
    free: FreeShape = NOTHING_FREE,
) -> Choice:
    """The settings of a run: those in `fixed` as they are, and of the others the fastest that fit.

    Arguments:
        fixed: by the names of fields of `MemorySettings` and `StateSettings`; "auto" is as good as left out.
        limits: what the machine has.
        machine: whose speed is predicted.
        free: what of `run_shape` is open. One chunk of heads and the fastest degrees are taken where any settings fit
            with them, else the fastest of all shapes that do.

    Raises ValueError if nothing fits, naming the keys or the number of GPUs that would make it fit.
    """
    return choose(Planner(model_shape, run_shape, limits, machine), fixed, free)


def choose(planner: Planner, fixed: Mapping[str, Any], free: FreeShape = NOTHING_FREE) -> Choice:
    """The same of the run of a planner."""
    ways, asked = Ways(planner, free), checked(fixed)
    found = ways.fastest(asked)
    if found is None:
        raise ValueError(refusal(ways, asked))
    planner = replace(planner, run=found.alive.run)
    alternatives = (*_alternatives(planner, found, asked), *(_other_chunks(planner, found) if free.chunks else ()))
    return Choice(found, asked, planner.limits, planner.machine, alternatives, free)


def longest(
    model_shape: ModelShape,
    run_shape: RunShape,
    fixed: Mapping[str, Any],
    limits: Limits,
    machine: Machine = SHIPPED["H200"],
    free: FreeShape = NOTHING_FREE,
) -> int:
    """The most tokens of a pack that fit in any way that agrees with `fixed` and in any shape that `free` allows, to a
    percent and in 1,024s a rank of the sequence; 0 if not even these fit. The documents of the run do not count: it is
    one.
    """
    return Ways(Planner(model_shape, run_shape, limits, machine), free).longest(checked(fixed))


def checked(fixed: Mapping[str, Any]) -> dict[str, Any]:
    """What is really fixed. Raises ValueError for a key that there is not."""
    if unknown := sorted(set(fixed) - set(KEYS)):
        raise ValueError(f"{unknown[0]} is no setting of memory: there are {', '.join(KEYS)}")
    return {key: value for key, value in fixed.items() if value != AUTO}


def _alternatives(planner: Planner, found: Settled, fixed: Mapping[str, Any]) -> Iterator[Alternative]:
    """Each other value of each free field, the others as chosen."""
    for key, tried in TRIED.items():
        for value in tried:
            if key in fixed or value == found.values[key] or (key == "mlp_tile" and not planner.model.tileable):
                continue
            values = {**found.values, key: value}
            if fixed.get("host_bytes") is None:
                del values["host_bytes"]
            if value == "all":
                values |= {"host_layers": 0, "every": 1}
            if (key == "every" and found.memory.keep not in ("attention", "layer")) or (
                key == "keep" and value == "selective" and values["every"] > 1
            ):
                continue
            yield _alternative(key, value, planner.settled(values), found)


def _other_chunks(planner: Planner, found: Settled) -> Iterator[Alternative]:
    """Other numbers of chunks of heads, the settings as chosen. Where one is enough others are not looked at."""
    run = planner.run
    for count in planner.model.head_chunks(run.ulysses) if run.head_chunks > 1 else ():
        if count != run.head_chunks:
            other = replace(planner, run=replace(run, head_chunks=count)).settled(found.values)
            yield _alternative("head_chunks", count, other, found)


def _alternative(key: str, value: Any, other: Settled, found: Settled) -> Alternative:
    slower = other.time.seconds / found.time.seconds - 1
    told = f"{abs(slower):.1%} {'slower' if slower >= 0 else 'faster'}"
    return Alternative(key, value, other, f"needs {other.lacking}" if other.lacking else told)
