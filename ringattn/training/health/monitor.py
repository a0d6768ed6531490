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
from pathlib import Path
from typing import Any

from ringattn.training.health import causes, places, processes
from ringattn.training.health.causes import Verdict
from ringattn.training.health.incidents import Ending, read_ending, record_incident, write_ending
from ringattn.training.health.local_ranks import POLL, LocalRanks, Seen, Watch, tell
from ringattn.training.health.record import Standing
from ringattn.training.health.stacks import Stack

TOLD_EVERY = 5.0  # seconds between files for other nodes
STOPPED_AFTER = 5.0  # seconds after which a stopped rank is named
WAITING_AFTER = 10.0  # seconds after which ranks that wait for others say so; then each time that has tripled
LAST_WORDS = 5.0  # seconds that ranks have to end by themselves when one is gone
PEER = "PeerFailed"  # a rank that failed because another one did


class Monitor(LocalRanks):
    """Watches the ranks of one machine until they are gone."""

    def __init__(self, watch: Watch) -> None:
        super().__init__(watch)
        self.host = socket.gethostname()
        self.began = time.monotonic()
        self._killed_before = processes.out_of_memory_kills()
        self._told_nodes, self._told_waiting = -TOLD_EVERY, WAITING_AFTER
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
            self.news = True
        elif late < 0.5:
            self._suspected = {}
        return self._hang(max(now - one.since for one in self.seen.values())) if late > 1 else None

    def _gone(self, one: Seen) -> Verdict:
        time.sleep(POLL)  # what a dying process wrote, and the kernel counted, is there now
        kills = processes.out_of_memory_kills() - self._killed_before
        return causes.gone(one.standing, self.host, kills, self.stack_of(one))

    def _stopped(self, held: list[Seen]) -> Verdict | None:
        """Of ranks that a signal holds: named after some seconds, and the end of the run when that is too long."""
        longest = max(time.monotonic() - one.stopped_since for one in held)
        patience = max(self.patience(one) for one in held)
        verdict = causes.stopped([one.standing for one in held], self.host, longest)
        if longest > patience:
            return verdict
        if longest > STOPPED_AFTER and not self.told_stopped:
            self.told_stopped = True
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

    # --- other nodes

    def tell_nodes(self) -> None:
        """Writes what other nodes may want to know, every few seconds."""
        now = time.monotonic()
        if self.watch.world_size == self.watch.ranks_per_node:
            return
        if now - self._told_nodes < TOLD_EVERY and not self.news:
            return
        self._told_nodes, self._beat, self.news = now, self._beat + 1, False
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
            ending = Ending("failed", verdict.restart, verdict.cause, step, rank, copy=self._copy(step))
            if first:
                write_ending(self.output, ending)
        standings, stacks = self._everywhere()
        lines = causes.table(standings, stacks, verdict.ranks)
        # What a rank that raised has to say stands on the screen already.
        if verdict.kind != "rank-failed":
            tell("\n  ".join([verdict.cause, *lines, self._next(ending.restart, step, self._copy(step))]))
        if first and verdict.kind != "rank-failed":
            self._write_incident(verdict, standings, stacks)
        self.end_ranks(0 if verdict.kind in ("rank-stopped", "hang", "launcher-gone") else LAST_WORDS)

    def _announce(self, verdict: Verdict) -> bool:
        """Tells the other nodes. Whether nobody was before us."""
        if not self.attempt:
            return True
        said = {"kind": verdict.kind, "ranks": verdict.ranks, "cause": verdict.cause, "restart": verdict.restart}
        said["node"] = self.watch.node
        path = places.verdict_file(self.output, self.attempt)
        return places.write_json(path, said, first=True) or not path.exists()

    def _copy(self, step: int) -> int:
        """Steps of a copy in memory of this machine's ranks that is newer than a checkpoint, or 0."""
        copy = places.newest_copy(Path(self.watch.copies) if self.watch.copies else None, self.watch.ranks)
        return copy if copy > step else 0

    def _next(self, restart: bool, step: int, copy: int) -> str:
        where = f"from the checkpoint of step {step}" if step else "from the start"
        if copy:
            where = f"from the copy in memory of step {copy}"
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
