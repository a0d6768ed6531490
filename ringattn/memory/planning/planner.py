"""One shape of a run: what its settings take, and of all that agree with what is asked for the fastest that fit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import product
from typing import Any

from ringattn.memory.planning.alive import Alive
from ringattn.memory.planning.attention import AttentionUse
from ringattn.memory.planning.limits import Limits
from ringattn.memory.planning.recurrent import RecurrentUse
from ringattn.memory.planning.settled import Settled
from ringattn.memory.planning.shapes import ModelShape, RunShape
from ringattn.memory.planning.step_time import step_time
from ringattn.memory.settings import MemorySettings, StateSettings
from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.machine.shipped import SHIPPED

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

    @property
    def mixing_seconds(self) -> float:
        """Of both in a step, but for what is computed again."""
        uses = [use for use in (self.attention, self.recurrent) if use is not None]
        return sum(use.forward_seconds + use.backward_seconds for use in uses)

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

    def fastest(self, fixed: Mapping[str, Any], limit: float = float("inf")) -> Settled | None:
        """The fastest that fits, or of several that are as fast the smallest; None if none fits. Layers go to the host
        only as far as they must: it makes nothing faster.

        Arguments:
            limit: seconds of a step, of which more are not looked at.
        """
        found: list[Settled] = []
        for way in sorted(self._settled_ways(fixed, TRIED), key=lambda one: one.time.seconds):
            if way.time.seconds > limit:
                break
            if (fitting := self._fitting(way, fixed)) is not None:
                found.append(fitting)
                limit = min(limit, fitting.time.seconds * (1 + TIE))
        return smallest([one for one in found if one.time.seconds <= limit])

    def leanest(self, fixed: Mapping[str, Any]) -> Settled:
        """One that fits if any does, else the one that lacks least on the GPU."""
        ways = list(self._settled_ways(fixed, LEAN))
        fitting = (found for way in ways if (found := self._fitting(way, fixed)) is not None)
        return next(fitting, None) or min(ways, key=lambda way: way.alive.peak().total)

    def smaller(self, settled: Settled, room: float) -> tuple[str, Any, Settled] | None:
        """Of all single changes of settings, and to more chunks of heads, that leave at most `room` bytes alive the
        fastest, with its key and value; without one that does, the one that takes least, if it takes less than
        `settled` does."""
        base = {key: value for key, value in settled.values.items() if key != "host_bytes"}
        ways = [
            (key, value, self.settled({**base, key: value}))
            for key, tried in (*TRIED.items(), ("host_layers", (len(self.model.layers),)))
            for value in tried
            if value != base[key] and _sensible({**base, key: value}, {})
            if key != "mlp_tile" or self.model.tileable
            if not (base["host_layers"] or key == "host_layers") or {**base, key: value}["keep"] != "all"
        ]
        ways += [
            ("head_chunks", count, replace(self, run=replace(self.run, head_chunks=count)).settled(base))
            for count in self.model.head_chunks(self.run.ulysses)
            if count > self.run.head_chunks
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


def smallest(ways: Sequence[Settled]) -> Settled | None:
    """Of those that are as fast as the fastest, the one that takes least memory; None if there are none."""
    fastest = min((one.time.seconds for one in ways), default=0.0)
    return min((one for one in ways if one.time.seconds <= fastest * (1 + TIE)), key=lambda one: one.size, default=None)


def _sensible(way: Mapping[str, Any], fixed: Mapping[str, Any]) -> bool:
    """Whether there is such a way, and nobody would do without it. What is fixed is left to be refused by name."""
    if "every" not in fixed and way["every"] > 1 and way["keep"] not in ("attention", "layer"):
        return False
    if "keep" not in fixed and way["keep"] == "all" and (fixed.get("host_layers") or way["every"] > 1):
        return False
    if "keep" not in fixed and way["keep"] == "selective" and way["every"] > 1:
        return False
    return way["reshard"] or bool(way["prefetch"]) or "reshard" in fixed or "prefetch" in fixed
