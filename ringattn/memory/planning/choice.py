"""Of all settings that agree with what is asked for, the fastest that fit; and the longest length that fits.

What changes the numbers that a run computes (the dtypes of weights, moments and reductions) is never chosen, only asked
for; all else gives the same loss and gradients.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import product
from typing import Any

from ringattn.memory.planning.alive import Alive
from ringattn.memory.planning.attention import AttentionUse
from ringattn.memory.planning.limits import GIB, Limits
from ringattn.memory.planning.recurrent import RecurrentUse
from ringattn.memory.planning.settled import Alternative, Settled
from ringattn.memory.planning.shapes import ModelShape, RunShape
from ringattn.memory.planning.step_time import StepTime, step_time
from ringattn.memory.planning.text import render
from ringattn.memory.settings import MemorySettings, StateSettings
from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.machine.shipped import SHIPPED

AUTO = "auto"
# What is tried of each field that is free.
TRIED: dict[str, tuple[Any, ...]] = {
    "loss_tile": (None, 4096, 2048, 1024),
    "mlp_tile": (None, 16384, 4096),
    "keep": ("all", "selective", "attention", "layer"),
    "every": (1, 2, 4),
    "states_on": ("device", "host"),
    "reshard": (True, False),
    "prefetch": (1, 0),
}
TIE = 0.005  # of the time: within it, what takes less memory is taken
# The least memory that is to be had of each.
LEAN: dict[str, tuple[Any, ...]] = {
    "loss_tile": (1024,),
    "mlp_tile": (4096,),
    "keep": ("layer",),
    "every": (1, 2, 4),
    "states_on": ("device", "host"),
    "reshard": (True,),
    "prefetch": (0,),
}
KEYS = tuple(one.name for kind in (MemorySettings, StateSettings) for one in fields(kind))
LONGEST = 1 << 31  # tokens of a pack


@dataclass(frozen=True)
class Choice:
    """The settings of a run, what they take and why they were taken."""

    settled: Settled
    fixed: Mapping[str, Any]
    limits: Limits
    machine: Machine
    alternatives: tuple[Alternative, ...]

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
        return render(self.settled, self.fixed, self.limits, self.machine, self.alternatives)


@dataclass(frozen=True)
class Planner:
    """One model, run and machine, for which settings are tried."""

    model: ModelShape
    run: RunShape
    limits: Limits
    machine: Machine = SHIPPED["H200"]

    @cached_property
    def attention(self) -> AttentionUse:
        """Of all settings the same."""
        return AttentionUse.of(self.model, self.run, self.machine)

    @cached_property
    def recurrent(self) -> RecurrentUse | None:
        """As that."""
        return RecurrentUse.of(self.model, self.run, self.machine)

    def settled(self, values: Mapping[str, Any]) -> Settled:
        """With these values of fields, and the defaults of others. Host memory is computed where it is not given."""
        values = dict(values)
        pinned = values.pop("host_bytes", None)
        if not values.get("host_layers"):
            alive = self._alive({**values, "host_bytes": pinned or 0})
        else:
            needed = self._alive({**values, "host_bytes": 1}).layers.host_bytes
            alive = self._alive({**values, "host_bytes": max(1, needed) if pinned is None else pinned})
        return Settled(alive, step_time(alive, self.machine), self.limits, pinned)

    def _alive(self, values: Mapping[str, Any]) -> Alive:
        own = {one.name for one in fields(MemorySettings)}
        memory = MemorySettings(**{key: value for key, value in values.items() if key in own})
        states = StateSettings(**{key: value for key, value in values.items() if key not in own})
        return Alive(self.model, self.run, memory, states, self.attention, recurrent=self.recurrent)

    def fastest(self, fixed: Mapping[str, Any]) -> Settled | None:
        """The fastest that fits, or of several that are as fast the smallest; None if none fits. Layers go to the host
        only as far as they must: it makes nothing faster."""
        found: list[Settled] = []
        limit = float("inf")
        for way in sorted(self._settled_ways(fixed, TRIED), key=lambda one: one.time.seconds):
            if way.time.seconds > limit:
                break
            if (fitting := self._fitting(way, fixed)) is not None:
                found.append(fitting)
                limit = min(limit, fitting.time.seconds * (1 + TIE))
        return min((one for one in found if one.time.seconds <= limit), key=lambda one: one.size, default=None)

    def leanest(self, fixed: Mapping[str, Any]) -> Settled:
        """One that fits if any does, else the one that lacks least on the GPU."""
        ways = list(self._settled_ways(fixed, LEAN))
        fitting = (found for way in ways if (found := self._fitting(way, fixed)) is not None)
        return next(fitting, None) or min(ways, key=lambda way: way.alive.peak().total)

    def smaller(self, settled: Settled, room: float) -> tuple[str, Any, Settled] | None:
        """Of all single changes that leave at most `room` bytes alive the fastest, with its key and value; without one
        that does, the one that takes least, if it takes less than `settled` does."""
        base = {key: value for key, value in settled.values.items() if key != "host_bytes"}
        ways = [
            (key, value, self.settled({**base, key: value}))
            for key, tried in (*TRIED.items(), ("host_layers", (len(self.model.layers),)))
            for value in tried
            if value != base[key] and _sensible({**base, key: value}, {})
            if key != "mlp_tile" or self.model.tileable
            if not (base["host_layers"] or key == "host_layers") or {**base, key: value}["keep"] != "all"
        ]
        fitting = [way for way in ways if way[2].alive.peak().total <= room]
        if fitting:
            return min(fitting, key=lambda way: way[2].time.seconds)
        least = min(ways, key=lambda way: way[2].alive.peak().total)
        return least if least[2].alive.peak().total < settled.alive.peak().total else None

    def _settled_ways(self, fixed: Mapping[str, Any], tried: Mapping[str, tuple[Any, ...]]) -> Iterator[Settled]:
        for values in self._ways(fixed, tried):
            yield self.settled({**values, "host_layers": fixed.get("host_layers", 0)})

    def _ways(self, fixed: Mapping[str, Any], tried: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
        """All values of the free fields, with those that are fixed."""
        options = {key: (fixed[key],) if key in fixed else values for key, values in tried.items()}
        if self.run.engine == "deepspeed":  # which has its own ways to gather
            options |= {key: (fixed.get(key, default),) for key, default in (("reshard", True), ("prefetch", 1))}
        if not self.model.tileable:
            options["mlp_tile"] = (fixed.get("mlp_tile"),)
        rest = {key: value for key, value in fixed.items() if key not in tried and key != "host_layers"}
        seen: set[tuple[Any, ...]] = set()
        for values in product(*options.values()):
            way = {**dict(zip(options, values, strict=True)), **rest}
            for key in ("loss_tile", "mlp_tile"):  # a tile of all tokens is none
                if key not in fixed and way[key] is not None and way[key] >= self.run.local_tokens:
                    way[key] = None
            if tuple(way.values()) not in seen and _sensible(way, fixed):
                seen.add(tuple(way.values()))
                yield way

    def _fitting(self, way: Settled, fixed: Mapping[str, Any]) -> Settled | None:
        """It, or with as few layers on the host as make it fit, or None."""
        if not way.lacking:
            return way
        if "host_layers" in fixed or way.memory.keep == "all":
            return None
        values = {key: value for key, value in way.values.items() if key != "host_bytes" or key in fixed}

        def away(count: int) -> Settled:
            return self.settled({**values, "host_layers": count})

        high = self._most_away(way, away)
        if not high or away(high).lacking:
            return None
        low = 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if not away(middle).lacking else (middle, high)
        return away(high)

    def _most_away(self, way: Settled, away: Callable[[int], Settled]) -> int:
        """The most layers for which there is host memory."""
        room = self.limits.host_room(self.run.ranks)
        room = min(room - sum(way.alive.held.host.values()), float("inf") if way.pinned is None else way.pinned)
        low, high = 0, len(self.model.layers)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if away(middle).alive.layers.host_bytes <= room else (low, middle - 1)
        return low


def _sensible(way: Mapping[str, Any], fixed: Mapping[str, Any]) -> bool:
    """Whether there is such a way, and nobody would do without it. What is fixed is left to be refused by name."""
    if "every" not in fixed and way["every"] > 1 and way["keep"] not in ("attention", "layer"):
        return False
    if "keep" not in fixed and way["keep"] == "all" and (fixed.get("host_layers") or way["every"] > 1):
        return False
    if "keep" not in fixed and way["keep"] == "selective" and way["every"] > 1:
        return False
    return way["reshard"] or bool(way["prefetch"]) or "reshard" in fixed or "prefetch" in fixed


def plan_run(
    model_shape: ModelShape,
    run_shape: RunShape,
    fixed: Mapping[str, Any],
    limits: Limits,
    machine: Machine = SHIPPED["H200"],
) -> Choice:
    """The settings of a run: those in `fixed` as they are, and of the others the fastest that fit.

    Arguments:
        fixed: by the names of fields of `MemorySettings` and `StateSettings`; "auto" is as good as left out.
        limits: what the machine has.
        machine: whose speed is predicted.

    Raises ValueError if nothing fits, naming the keys or the number of GPUs that would make it fit.
    """
    planner, asked = Planner(model_shape, run_shape, limits, machine), checked(fixed)
    found = planner.fastest(asked)
    if found is None:
        raise ValueError(refusal(planner, asked))
    return Choice(found, asked, limits, machine, tuple(_alternatives(planner, found, asked)))


def longest(
    model_shape: ModelShape,
    run_shape: RunShape,
    fixed: Mapping[str, Any],
    limits: Limits,
    machine: Machine = SHIPPED["H200"],
) -> int:
    """The most tokens of a pack that fit in any way that agrees with `fixed`, to a percent and in 1,024s a rank of the
    sequence; 0 if not even these fit. The documents of the run do not count: it is one.
    """
    asked, step = checked(fixed), 1024 * run_shape.ring * run_shape.ulysses

    def fits(count: int) -> bool:
        run = replace(run_shape, tokens=count * step, lengths=())
        return not Planner(model_shape, run, limits, machine).leanest(asked).lacking

    if not fits(1):
        return 0
    low, high = 1, 2
    while high * step < LONGEST and fits(high):
        low, high = high, 2 * high
    high = min(high, LONGEST // step)
    while high - low > max(1, low // 128):  # to a percent
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * step


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
            other = planner.settled(values)
            slower = other.time.seconds / found.time.seconds - 1
            reason = (
                f"needs {other.lacking}"
                if other.lacking
                else f"{abs(slower):.1%} {'slower' if slower >= 0 else 'faster'}"
            )
            yield Alternative(key, value, other, reason)


def refusal(planner: Planner, fixed: Mapping[str, Any]) -> str:
    """Why nothing fits, and what would."""
    least = planner.leanest(fixed)
    peak, run = least.alive.peak(), planner.run
    top = sorted(peak.items.items(), key=lambda pair: -pair[1])[:3]
    told = ", ".join(f"{name} {size / GIB:.1f}" for name, size in top)
    ways = list(_ways_out(planner, fixed))
    would = "; it would fit with " + ", or with ".join(ways) if ways else ""
    return (
        f"{run.tokens} tokens of {planner.model.name} do not fit {run.ranks} GPUs: the leanest settings need "
        f"{least.lacking} (at {peak.name}: {told} GiB){would}"
    )


def _ways_out(planner: Planner, fixed: Mapping[str, Any]) -> Iterator[str]:
    """Changes that make a run fit, each by itself."""
    for key in fixed:
        if key in TRIED or key == "host_layers":
            free = {name: value for name, value in fixed.items() if name != key}
            if not planner.leanest(free).lacking:
                yield f"{key}={AUTO}"
    for small in (
        {"moments": "int8"},
        {"weights": "bfloat16", "moments": "bfloat16"},
        {"weights": "bfloat16", "moments": "int8"},
    ):
        if (
            any(fixed.get(key, "float32") != value for key, value in small.items())
            and not planner.leanest({**fixed, **small}).lacking
        ):
            yield " ".join(f"{key}={value}" for key, value in small.items())
            break
    for times in (2, 4, 8, 16, 32, 64):
        run = replace(planner.run, ring=planner.run.ring * times)
        if not replace(planner, run=run).leanest(fixed).lacking:
            yield f"{run.ranks} GPUs"
            break
    if fewer := longest(planner.model, planner.run, fixed, planner.limits, planner.machine):
        yield f"at most {fewer} tokens"
