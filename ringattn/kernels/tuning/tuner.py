"""Choosing the fastest of several ways to do one thing: measured once, checked before use, kept on disk.

The order of selection: an override of this call > memory > disk > a measurement, if the policy is "on" > the default.
A candidate is only measured after its numbers were checked, forward and backward. In a distributed job rank 0 of the
group decides and the others are told, so that ranks never differ.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from ringattn.environment import AUTOTUNE, logger
from ringattn.kernels.apart import in_a_thread
from ringattn.kernels.tuning.store import SCHEMA, Store

BUDGET_MS = 200.0  # for the timed runs of one candidate
MOST_RUNS = 50

Choice = dict[str, Any]  # named settings, JSON values


def bucket(length: int) -> int:
    """The power of two next to a length, so that a few tokens more or less are the same shape."""
    if length < 1:
        return 0
    lower = 1 << (length.bit_length() - 1)
    return lower if length * length < 2 * lower * lower else 2 * lower


@dataclass(frozen=True)
class Key:
    """What a result is valid for: the operation, static facts of the shape, the device and the software.

    Seeds, exact lengths and values that change nothing about speed do not belong here: each would be measured anew.
    """

    operation: str
    facts: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, operation: str, device: str, versions: dict[str, str], **facts: Any) -> "Key":
        own = {"device": device_name(device), "torch": torch.__version__, "schema": SCHEMA}
        return cls(operation, tuple(sorted((own | versions | facts).items())))

    def __str__(self) -> str:
        return " ".join([self.operation, *(f"{name}={value}" for name, value in self.facts)])


def device_name(device: str) -> str:
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return device


@dataclass(frozen=True)
class Problem:
    """One choice to make. The functions are called only where they are needed, on one rank: none may communicate.

    Arguments:
        candidates: the possible choices, in a fixed order.
        default: the choice of the heuristic.
        check: why the numbers of a choice are wrong, forward or backward, or None; it may raise.
        run: what is timed, usually forward and backward once.
        device: type of the device that `run` keeps busy.
    """

    key: Key
    candidates: Callable[[], Sequence[Choice]]
    default: Callable[[], Choice]
    check: Callable[[Choice], str | None]
    run: Callable[[Choice], Any]
    device: str


@dataclass(frozen=True)
class Event:
    """What happened on the way to a choice. `kind`: override, memory, disk, refused, timed, measured, default, told."""

    kind: str
    key: str
    choice: Choice | None = None
    detail: str = ""


@dataclass
class Tuner:
    """Makes and keeps choices.

    Arguments:
        store: results on disk; None: none.
        policy: "on" measures what is not known, "off" does not; default: RINGATTN_AUTOTUNE.
        listeners: called with every `Event`.
        timer: (run, device) -> milliseconds.
    """

    store: Store | None = field(default_factory=Store)
    policy: str | None = None
    listeners: list[Callable[[Event], None]] = field(default_factory=list)
    timer: Callable[[Callable[[], Any], str], float] = field(default_factory=lambda: timed_ms)

    def __post_init__(self) -> None:
        if self.policy is None:
            self.policy = AUTOTUNE.read()
        if self.policy not in AUTOTUNE.choices:
            raise ValueError(f"policy must be one of {', '.join(AUTOTUNE.choices)}, got {self.policy!r}")
        self._memory: dict[str, Choice] = {}
        self._history: dict[str, list[Event]] = {}

    def select(
        self, problem: Problem, override: Choice | None = None, group: dist.ProcessGroup | None = None
    ) -> Choice:
        """The choice for a problem.

        With a group the first call for a key is collective: every rank of it must ask for the same keys in the same
        order. An override belongs to this call: nothing is stored and nothing is sent.

        Raises RuntimeError with the reasons if every candidate fails, on every rank; and if ranks asked for different
        keys.
        """
        name = str(problem.key)
        if override is not None:
            self._tell(Event("override", name, override))
            return dict(override)
        if name in self._memory:
            self._tell(Event("memory", name, self._memory[name]))
        elif group is None or dist.get_world_size(group) == 1:
            self._memory[name] = self._decide(problem, name)
        else:
            self._memory[name] = self._agree_with_rank_0(problem, name, group)
        return dict(self._memory[name])

    def explain(self, key: Key) -> str:
        """How the choice for a key came about, one line per event."""
        events = self._history.get(str(key), [])
        return "\n".join(f"{event.kind}: {event.choice} {event.detail}".rstrip() for event in events) or "not asked yet"

    def measure(self, problem: Problem) -> Choice:
        """The fastest candidate that passes its check, stored; whatever the policy and whatever was stored before."""
        name = str(problem.key)
        times: list[tuple[float, Choice]] = []
        reasons: list[str] = []
        for choice in problem.candidates():
            reason, milliseconds = self._try_choice(problem, choice)
            if reason is not None:
                reasons.append(f"{choice}: {reason}")
                self._tell(Event("refused", name, choice, reason))
            else:
                times.append((milliseconds, choice))
                self._tell(Event("timed", name, choice, f"{milliseconds:.3f} ms"))
        if not times:
            raise RuntimeError(f"no candidate for {name} works: {'; '.join(reasons) or 'there is none'}")
        fastest, best = min(times, key=lambda pair: pair[0])
        if self.store is not None:
            self.store.write(name, {"choice": best, "ms": round(fastest, 4)})
        self._memory[name] = best
        self._tell(Event("measured", name, best, f"{fastest:.3f} ms, of {len(times) + len(reasons)} candidates"))
        return dict(best)

    def _try_choice(self, problem: Problem, choice: Choice) -> tuple[str | None, float]:
        """Why a candidate is out, or its time."""
        try:
            reason = problem.check(choice)
            if reason:
                return reason, 0.0
            return None, in_a_thread(lambda: self.timer(lambda: problem.run(choice), problem.device))
        except Exception as error:  # whatever a kernel or its compiler raises
            return f"{type(error).__name__}: {str(error)[:200]}", 0.0

    def _decide(self, problem: Problem, name: str) -> Choice:
        stored = self._stored(problem, name)
        if stored is not None:
            return stored
        if self.policy == "on":
            return self.measure(problem)
        choice = problem.default()  # not stored: it must not stand in the way of a later measurement
        self._tell(Event("default", name, choice))
        return choice

    def _stored(self, problem: Problem, name: str) -> Choice | None:
        """What the disk says, if it passes the check here and now."""
        entry = self.store.read(name) if self.store is not None else None
        choice = entry.get("choice") if entry is not None else None
        if not isinstance(choice, dict):
            return None
        try:
            reason = problem.check(choice)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error)[:200]}"
        self._tell(Event("refused" if reason else "disk", name, choice, reason or ""))
        return None if reason else choice

    def _agree_with_rank_0(self, problem: Problem, name: str, group: dist.ProcessGroup) -> Choice:
        """Rank 0's decision, or its error, on every rank; collective."""
        box: list[Any] = [None]
        if dist.get_rank(group) == 0:
            try:
                box = [(self._decide(problem, name), None)]
            except Exception as error:  # the others wait: they must hear of it
                box = [(None, str(error))]
        dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
        choice, error_text = box[0]
        asked: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(asked, (name, digest(choice)), group=group)
        if len(set(asked)) > 1:
            raise RuntimeError(f"ranks disagree about what to tune: {sorted(set(asked))}")
        if error_text is not None:
            raise RuntimeError(error_text)
        self._tell(Event("told", name, choice, "by rank 0"))
        return choice

    def _tell(self, event: Event) -> None:
        """Repetitions of what is known are sent to listeners but not kept."""
        history = self._history.setdefault(event.key, [])
        if event not in history:
            history.append(event)
            logger().debug("tuning %s: %s %s %s", event.key, event.kind, event.choice, event.detail)
        for listener in self.listeners:
            listener(event)


def digest(choice: Choice | None) -> str:
    return hashlib.sha256(json.dumps(choice, sort_keys=True).encode()).hexdigest()[:16]


def timed_ms(run: Callable[[], Any], device: str, budget_ms: float = BUDGET_MS) -> float:
    """Median time of one run in milliseconds, after warming up: as many runs as the budget allows, at least one."""
    clock = _cuda_ms if device == "cuda" else _host_ms
    clock(run, 1)  # compiles
    first = clock(run, 1)[0]
    if first > budget_ms:
        return first
    count = max(1, min(MOST_RUNS, int(budget_ms / max(first, 1e-3))))
    return median(clock(run, count))


def _host_ms(run: Callable[[], Any], count: int) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _cuda_ms(run: Callable[[], Any], count: int) -> list[float]:
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, stop in pairs:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in pairs]
