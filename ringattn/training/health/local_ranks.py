"""The ranks of one machine as its monitor sees them: their records, their processes, and their stacks."""

import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ringattn.training.health import places, processes
from ringattn.training.health.record import Standing, read_record
from ringattn.training.health.stacks import SIGNAL, Stack, from_outside, read_stacks

POLL = 0.25  # seconds between looks
LEAST, TIMES = 60.0, 10  # `auto`: so many seconds, and so many times the slowest of recent steps
SLOW = 1800.0  # seconds that starting, the first step (which compiles) and saving may take at least
RECENT = 20  # steps


@dataclass(frozen=True)
class Watch:
    """What a monitor is told as it starts.

    Arguments:
        folder: of the records.
        output: the run's folder.
        node, ranks_per_node, world_size: which ranks are here.
        leader: process of the rank that starts the monitor, and when it began.
        agent: process that started the ranks and ends with them (torchrun), and when it began; 0 if there is none.
        hang_after: seconds, or None for those that measured steps allow.
        restarts: how often the agent will start the ranks again.
        lock: a file descriptor that holds the run's lock while it is open, or -1.
        copies: folder of the state's copies in memory on this machine, or "" for a run that keeps none.
    """

    folder: str
    output: str
    node: int
    ranks_per_node: int
    world_size: int
    leader: tuple[int, int]
    agent: tuple[int, int]
    hang_after: float | None
    restarts: int
    lock: int
    copies: str = ""

    @property
    def ranks(self) -> range:
        return range(self.node * self.ranks_per_node, (self.node + 1) * self.ranks_per_node)


@dataclass
class Seen:
    """A rank of this machine as the monitor knows it."""

    path: Path
    standing: Standing
    since: float  # the monitor's clock when its record last changed
    state: str = processes.ALIVE
    stopped_since: float = 0.0
    steps: list[float] = field(default_factory=list)

    @property
    def stacks_path(self) -> Path:
        return self.path.with_suffix(".stacks")


class LocalRanks:
    """What is seen of them.

    `news` is set when something happened that other machines want to know; `told_stopped` while a stopped rank has
    been named.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch, self.output = watch, Path(watch.output)
        self.seen: dict[int, Seen] = {}
        self.news, self.told_stopped = False, False

    def look(self) -> bool:
        """Reads all records of this machine. Whether a rank is left, or may yet come."""
        now = time.monotonic()
        for rank in self.watch.ranks:
            if rank not in self.seen and (found := self._find(rank)) is not None:
                self.seen[rank] = found
        for one in self.seen.values():
            standing = read_record(one.path) or one.standing
            if standing != one.standing:
                if standing.step > one.standing.step and standing.step_seconds:
                    one.steps = [*one.steps, standing.step_seconds][-RECENT:]
                one.standing, one.since = standing, now
            state = processes.state(standing.pid, standing.started)
            if state != one.state:
                one.state, self.news = state, True
            if one.state != processes.STOPPED:
                if one.stopped_since and self.told_stopped and state == processes.ALIVE:
                    tell(f"rank {standing.rank} goes on after {now - one.stopped_since:.0f} s")
                    self.told_stopped = False
                one.stopped_since = 0.0
            elif not one.stopped_since:
                one.stopped_since = now
        alive = any(one.state != processes.GONE for one in self.seen.values())
        return alive or (not self.seen and processes.state(*self.watch.leader) != processes.GONE)

    def _find(self, rank: int) -> Seen | None:
        """The record of a rank of this start: older ones, of ranks that are gone, may lie beside it."""
        now = time.monotonic()
        for path in places.records_in(Path(self.watch.folder)):
            one = read_record(path)
            if one is not None and one.rank == rank and processes.state(one.pid, one.started) != processes.GONE:
                return Seen(path, one, now)
        return None

    def patience(self, one: Seen) -> float:
        """Seconds that a rank's record may stay as it is. What the user gives counts for saving too, but not for
        starting and the first step."""
        given = self.watch.hang_after
        patience = max([LEAST, *(TIMES * took for seen in self.seen.values() for took in seen.steps)])
        patience = patience if given is None else given
        long = one.standing.phase in ("starting", "joining") or (given is None and one.standing.phase == "saving")
        long |= one.standing.step_seconds == 0  # the first step compiles
        return max(patience, SLOW) if long else patience

    def take_stacks(self) -> dict[int, Stack]:
        """Asks every rank that runs for its stacks, and looks at stopped ones from outside."""
        for one in self.seen.values():
            with suppress(OSError):
                os.truncate(one.stacks_path, 0)  # what an earlier doubt left there; ranks add to its end
            if one.state == processes.ALIVE and one.stacks_path.exists():
                processes.end(one.standing.pid, one.standing.started, SIGNAL)
            elif one.state == processes.STOPPED and (text := from_outside(one.standing.pid)):
                with open(one.stacks_path, "a") as file:
                    file.write(text)
        self._ask_for_flights()
        time.sleep(2 * POLL)
        return {rank: stack for rank, one in self.seen.items() if (stack := self.stack_of(one)) is not None}

    def _ask_for_flights(self) -> None:
        """Has NCCL's flight recorders write; they need a second or two for it."""
        for rank in self.seen:
            pipe = places.flights_pipe(Path(self.watch.folder), rank)
            with suppress(OSError):  # no NCCL, or nobody reads
                if pipe.exists():
                    places.flights(self.output).parent.mkdir(exist_ok=True)
                    descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
                    os.write(descriptor, b"1\n")
                    os.close(descriptor)

    def stack_of(self, one: Seen) -> Stack | None:
        try:
            text = one.stacks_path.read_text(errors="replace")
        except OSError:
            return None
        return read_stacks(text) if text else None

    def end_ranks(self, patience: float) -> None:
        """Ends the ranks of this machine: those that do not end by themselves in time are killed."""
        deadline = time.monotonic() + patience
        while self.look() and time.monotonic() < deadline and not self._agent_gone():
            time.sleep(POLL)
        for one in self.seen.values():
            processes.end(one.standing.pid, one.standing.started, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while self.look() and time.monotonic() < deadline:
            time.sleep(POLL)

    def _agent_gone(self) -> bool:
        agent, began = self.watch.agent
        return bool(agent) and processes.state(agent, began) == processes.GONE

    def close(self) -> None:
        """Leaves nothing in memory."""
        for one in self.seen.values():
            pipe = places.flights_pipe(Path(self.watch.folder), one.standing.rank)
            for path in (one.path, one.stacks_path, pipe):
                path.unlink(missing_ok=True)
        try:
            Path(self.watch.folder).rmdir()
        except OSError:  # the records of others are in it
            return


def tell(message: str) -> None:
    try:
        sys.stderr.write(f"ringattn: {message}\n")
        sys.stderr.flush()
    except OSError:  # who read it is gone
        return
