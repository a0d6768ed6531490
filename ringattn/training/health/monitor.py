"""The process beside the ranks of a machine that says when one of them stands still or is gone, and ends the run.

Started by the first rank of the machine, in a session of its own, so that what ends ranks leaves it. It ends by itself
a moment after the last of them. It listens nowhere: nodes tell each other what they see in files of the run's folder.
"""

import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ringattn.training.health import causes, places, processes
from ringattn.training.health.causes import Verdict
from ringattn.training.health.record import Standing, read_record
from ringattn.training.health.stacks import SIGNAL, Stack, from_outside, read_stacks
from ringattn.training.incidents import Ending, read_ending, record_incident, write_ending

POLL = 0.25  # seconds between looks at this machine's ranks
TOLD_EVERY = 5.0  # seconds between files for other nodes
STOPPED_AFTER = 5.0  # seconds after which a stopped rank is named
WAITING_AFTER = 10.0  # seconds after which ranks that wait for others say so; then each time that has tripled
LAST_WORDS = 5.0  # seconds that ranks have to end by themselves when one is gone
LEAST, TIMES = 60.0, 10  # `auto`: so many seconds, and so many times the slowest of recent steps
SLOW = 1800.0  # seconds that starting, the first step (which compiles) and saving may take at least
RECENT = 20  # steps
PEER = "PeerFailed"  # a rank that failed because another one did


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


class Monitor:
    """Watches the ranks of one machine until they are gone."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.output = watch, Path(watch.output)
        self.host = socket.gethostname()
        self.began = time.monotonic()
        self.seen: dict[int, Seen] = {}
        self._killed_before = processes.out_of_memory_kills()
        self._told_nodes, self._told_waiting, self._told_stopped = -TOLD_EVERY, WAITING_AFTER, False
        self._suspected: dict[int, Stack] = {}
        self._beat = 0

    def run(self) -> None:
        """Until no rank of this machine is left."""
        left = True
        while left:
            left = self.look()
            verdict = self.heard() or self.judge()
            self.tell_nodes()
            if verdict is not None:
                self.finish(verdict)
                break
            self.tell_waiting()
            time.sleep(POLL if left else 0)
        self.close()

    # --- looking

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
                one.state, self._told_nodes = state, -TOLD_EVERY  # other nodes shall know now
            if one.state != processes.STOPPED:
                if one.stopped_since and self._told_stopped and state == processes.ALIVE:
                    tell(f"rank {standing.rank} goes on after {now - one.stopped_since:.0f} s")
                    self._told_stopped = False
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
        """Seconds that a rank's record may stay as it is."""
        given = self.watch.hang_after
        patience = max([LEAST, *(TIMES * took for seen in self.seen.values() for took in seen.steps)])
        patience = patience if given is None else given
        long = one.standing.phase in ("starting", "joining", "saving")
        long |= one.standing.step_seconds == 0  # the first step compiles
        return max(patience, SLOW) if long else patience

    # --- judging

    def judge(self) -> Verdict | None:
        """What is wrong here, if anything is. Names a stopped rank before it is a reason to end."""
        now = time.monotonic()
        agent, began = self.watch.agent
        if agent and processes.state(agent, began) == processes.GONE:
            return Verdict(
                "launcher-gone", (),
                f"the launcher (process {agent} on {self.host}) is gone, and nobody would start these ranks again",
            )  # fmt: skip
        if verdict := self._ended(now):
            return verdict
        held = [one for one in self.seen.values() if one.stopped_since]
        if held:
            return self._stopped(held)
        return self._still(now)

    def _ended(self, now: float) -> Verdict | None:
        """Of ranks that are gone before their time. Torchrun may have ended one because another failed, and lost
        connections are nobody's reason: a rank with a reason of its own comes first."""
        ended = [one for one in self.seen.values() if one.state == processes.GONE]
        failed = [one for one in self.seen.values() if one.standing.phase == "failed"]
        reasons = [one for one in failed if not one.standing.message.startswith(PEER)]
        late = any(now - one.since > 4 * LAST_WORDS for one in failed)  # and still there: it cannot end
        if reasons and (ended or late):
            return causes.failed(reasons[0].standing)
        for one in ended:
            if one.standing.phase not in ("done", "failed"):
                return self._gone(one)
        if failed and (late or len(ended) == len(self.seen)):
            return causes.disconnected([one.standing for one in failed], self.host)
        return None

    def _still(self, now: float) -> Verdict | None:
        """Whether a rank stands still for longer than it may. Stacks are taken before that: as it ends it is late."""
        late = 0.0  # of what a rank may: the share that has passed
        for one in self.seen.values():
            if one.standing.phase != "done":
                late = max(late, (now - one.since) / self.patience(one))
        if late > 0.75 and not self._suspected:
            self._suspected = self.take_stacks()
            self._told_nodes = -TOLD_EVERY  # other nodes shall know now
        elif late < 0.5:
            self._suspected = {}
        return self._hang(max(now - one.since for one in self.seen.values())) if late > 1 else None

    def _gone(self, one: Seen) -> Verdict:
        time.sleep(POLL)  # what a dying process wrote, and the kernel counted, is there now
        kills = processes.out_of_memory_kills() - self._killed_before
        return causes.gone(one.standing, self.host, kills, self._stack_of(one))

    def _stopped(self, held: list[Seen]) -> Verdict | None:
        """Of ranks that a signal holds: named after some seconds, and the end of the run when that is too long."""
        longest = max(time.monotonic() - one.stopped_since for one in held)
        patience = max(self.patience(one) for one in held)
        verdict = causes.stopped([one.standing for one in held], self.host, longest)
        if longest > patience:
            return verdict
        if longest > STOPPED_AFTER and not self._told_stopped:
            self._told_stopped = True
            tell(f"{verdict.cause}; the others wait, and the run ends in {patience - longest:.0f} s unless it goes on")
        return None

    def _hang(self, seconds: float) -> Verdict:
        standings, stacks = self._everywhere()
        for said in self._others():
            if said["stopped"]:  # its own monitor will say so, but we have been first
                held = [standings[rank] for rank in said["stopped"]]
                return causes.stopped(held, said["host"], seconds)
        return causes.hang(standings, stacks, self.watch.world_size, seconds)

    def _everywhere(self) -> tuple[dict[int, Standing], dict[int, Stack]]:
        """What is known of the ranks of all nodes."""
        standings = {rank: one.standing for rank, one in self.seen.items()}
        stacks = dict(self._suspected)
        for said in self._others():
            standings |= {int(rank): Standing(**one) for rank, one in said["ranks"].items()}
            stacks |= {int(rank): Stack(**one) for rank, one in said["stacks"].items()}
        return standings, stacks

    def _others(self) -> list[dict[str, Any]]:
        """What the monitors of other nodes have said in this start."""
        nodes = range(self.watch.world_size // self.watch.ranks_per_node)
        files = [places.node_file(self.output, node) for node in nodes if node != self.watch.node]
        found = [places.read_json(file) for file in files]
        return [said for said in found if said is not None and said.get("attempt") == self.attempt]

    @property
    def attempt(self) -> int:
        """What the ranks of one start agreed on, 0 before."""
        return max((one.standing.attempt for one in self.seen.values()), default=0)

    # --- stacks

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
        return {rank: stack for rank, one in self.seen.items() if (stack := self._stack_of(one)) is not None}

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

    def _stack_of(self, one: Seen) -> Stack | None:
        try:
            text = one.stacks_path.read_text(errors="replace")
        except OSError:
            return None
        return read_stacks(text) if text else None

    # --- other nodes

    def tell_nodes(self) -> None:
        """Writes what other nodes may want to know, every few seconds."""
        now = time.monotonic()
        if now - self._told_nodes < TOLD_EVERY or self.watch.world_size == self.watch.ranks_per_node:
            return
        self._told_nodes, self._beat = now, self._beat + 1
        said = {
            "attempt": self.attempt,
            "host": self.host,
            "beat": self._beat,
            "ranks": {rank: one.standing.plain() for rank, one in self.seen.items()},
            "stacks": {rank: stack.plain() for rank, stack in self._suspected.items()},
            "stopped": [rank for rank, one in self.seen.items() if one.stopped_since],
        }
        places.write_json(places.node_file(self.output, self.watch.node), said)

    def heard(self) -> Verdict | None:
        """What another node's monitor has decided."""
        if not self.attempt:
            return None
        said = places.read_json(places.verdict_file(self.output, self.attempt))
        if said is None:
            return None
        return Verdict(said["kind"], tuple(said["ranks"]), said["cause"], said["restart"])

    def tell_waiting(self) -> None:
        """Says who is here and who is missed while ranks wait for each other at the start."""
        waited = time.monotonic() - self.began
        if waited < self._told_waiting or self.attempt:
            return
        self._told_waiting = 3 * waited
        here = [rank for rank, one in self.seen.items() if one.standing.phase == "joining"]
        if not here:
            return
        known = {int(rank) for node in self._nodes_here() for rank in node["ranks"]} | set(self.seen)
        missing = sorted(set(range(self.watch.world_size)) - known)
        who = f"{causes.names(missing)} did not start yet" if missing else "all have started"
        tell(f"{causes.names(here)} on {self.host} wait for the others since {waited:.0f} s: {who}")

    def _nodes_here(self) -> list[dict[str, Any]]:
        """What nodes say that wrote lately, by the clock of the file system."""
        found = []
        own = places.node_file(self.output, self.watch.node)
        for node in range(self.watch.world_size // self.watch.ranks_per_node):
            path = places.node_file(self.output, node)
            try:
                fresh = own.stat().st_mtime - path.stat().st_mtime < places.FRESH
            except OSError:
                continue
            said = places.read_json(path) if fresh else None
            if said is not None and not said["attempt"]:
                found.append(said)
        return found

    # --- the end

    def finish(self, verdict: Verdict) -> None:
        """Tells everybody, writes it down, and ends this machine's ranks."""
        if verdict.kind in ("rank-stopped", "hang") and not self._suspected:
            self._suspected = self.take_stacks()
        step = places.newest_step(self.output)
        first = self._announce(verdict)
        ending = read_ending(self.output)
        if ending is None:
            rank = verdict.ranks[0] if verdict.ranks else None
            ending = Ending("failed", verdict.restart, verdict.cause, step, rank)
            if first:
                write_ending(self.output, ending)
        standings, stacks = self._everywhere()
        lines = causes.table(standings, stacks, verdict.ranks)
        # What a rank that raised has to say stands on the screen already.
        if verdict.kind != "rank-failed":
            tell("\n  ".join([verdict.cause, *lines, self._next(ending.restart, step)]))
        if first and verdict.kind != "rank-failed":
            self._write_incident(verdict, standings, stacks)
        self._end_ranks(0 if verdict.kind in ("rank-stopped", "hang", "launcher-gone") else LAST_WORDS)

    def _announce(self, verdict: Verdict) -> bool:
        """Tells the other nodes. Whether nobody was before us."""
        if not self.attempt:
            return True
        said = {"kind": verdict.kind, "ranks": verdict.ranks, "cause": verdict.cause, "restart": verdict.restart}
        said["node"] = self.watch.node
        path = places.verdict_file(self.output, self.attempt)
        return places.write_json(path, said, first=True) or not path.exists()

    def _next(self, restart: bool, step: int) -> str:
        where = f"from the checkpoint of step {step}" if step else "from the start"
        if not restart:
            return "next: the run ends, and the same command would come to the same end"
        agent, began = self.watch.agent
        if self.watch.restarts > 0 and agent and processes.state(agent, began) != processes.GONE:
            return f"next: all ranks end and start again, {where} ({self.watch.restarts} restarts left)"
        return f"next: all ranks end; the same command goes on {where}"

    def _write_incident(self, verdict: Verdict, standings: dict[int, Standing], stacks: dict[int, Stack]) -> None:
        rank = verdict.ranks[0] if verdict.ranks else None
        where = {str(rank): one.where() for rank, one in sorted(standings.items())}
        own = {str(rank): stack.plain() for rank, stack in sorted(stacks.items())}
        facts = {"ranks": verdict.ranks, "restart": verdict.restart, "where": where, "stacks": own, "host": self.host}
        path = record_incident(self.output, verdict.kind, verdict.cause, rank, **facts)
        if path is None:
            return
        for rank, one in self.seen.items():
            with suppress(OSError):
                if text := one.stacks_path.read_text(errors="replace"):
                    path.with_name(f"{path.stem}-stacks-of-rank{rank}.txt").write_text(text)
            with suppress(OSError):  # without NCCL there is none
                places.flights(self.output, rank).rename(path.with_name(f"{path.stem}-flights-of-rank{rank}"))

    def _end_ranks(self, patience: float) -> None:
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


def main() -> None:
    """Of the process. Its one argument is a `Watch` as JSON."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they are for the ranks, and it ends when these have
    given = json.loads(sys.argv[1])
    given |= {"leader": tuple(given["leader"]), "agent": tuple(given["agent"])}
    os.chdir("/")
    places.sweep()
    Monitor(Watch(**given)).run()


if __name__ == "__main__":
    main()
