"""`ringattn train` beside torchrun: signals reach the ranks and not torchrun, and the exit code says how the run ended.

torchrun answers a signal by ending its ranks after a time of its own (30 s before torch 2.13), and exits with 1 and a
traceback whatever the ranks did. So it runs in a session of its own, which signals to this process do not reach: the
ranks are told (SIGUSR1), save, and end well, and so does torchrun. It ends with this process, however that ends: the
kernel sends it SIGTERM, upon which the ranks save too.
"""

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from ringattn.training.health import places, processes
from ringattn.training.health.endings import CHANGE_FIRST, DONE, FAILED, STOPPED, exit_code
from ringattn.training.health.incidents import Ending, read_ending
from ringattn.training.health.record import Standing, read_record

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
POLL = 0.2  # seconds
WAITING_AFTER, BETWEEN = 10.0, 5.0  # seconds until machines that are missed are named, and between looks for them
LOOK_EVERY = 3.0  # seconds between looks at exit.json
LAST_WORDS = 10.0  # seconds that torchrun has to end once its ranks had theirs
FORSAKEN = 20.0  # seconds after its last rank that torchrun may take to end, if it starts none again
_PR_SET_PDEATHSIG = 1


class Launcher:
    """torchrun and what is told to it.

    Arguments:
        command: of torchrun.
        output: the run's folder.
        grace: seconds that ranks have to save once they are told to stop.
        nodes: that take part, and the number of this one; None for one machine alone.
        restarts: how often torchrun may start the ranks again.
    """

    def __init__(
        self,
        command: Sequence[str],
        output: Path,
        grace: float,
        nodes: tuple[int, int] | None = None,
        restarts: int = 0,
    ) -> None:
        self.command, self.output, self.grace, self.nodes = command, output, grace, nodes
        self._restarts, self._left = restarts, math.inf  # when the last rank was seen
        self._began = datetime.now(UTC)
        self._signals: list[int] = []
        self._process: subprocess.Popen[bytes]
        self._refusal: Path | None = None
        self._looked = time.monotonic()
        self._waiting, self._told_at = WAITING_AFTER if nodes else math.inf, 0.0

    def run(self) -> int:
        """Until torchrun has ended; the exit code, as `endings` has them."""
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            if before[number] != signal.SIG_IGN:  # nohup
                signal.signal(number, lambda number, _: self._signals.append(number))
        try:
            self._process = subprocess.Popen(self.command, start_new_session=True, preexec_fn=ends_with_this())
            self._refusal = places.refusal_file(self._process.pid)
            self._refusal.touch(mode=0o600)
            self._wait()
            refused = self._refused()
        finally:
            if self._refusal is not None:
                self._refusal.unlink(missing_ok=True)
            for number, handler in before.items():
                signal.signal(number, handler)
        return CHANGE_FIRST if refused else self._told(self._process.returncode)

    def _wait(self) -> None:
        began = time.monotonic()
        while self._process.poll() is None:
            if self._signals:
                return self._stop()
            if self._refused() or self._hopeless():
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(LAST_WORDS)  # it ends by itself if it has no restarts to try
                return self._end()
            self._tell_waiting(time.monotonic() - began)
            time.sleep(POLL)
        return None

    def _refused(self) -> bool:
        """Whether a rank has said that it cannot start. The file is gone once rank 0 could."""
        try:
            return self._refusal is not None and self._refusal.stat().st_size > 0
        except OSError:
            return False

    def _hopeless(self) -> bool:
        """Whether the run has failed in a way that would happen again, or torchrun outlives its ranks, since it waits
        for a machine that cannot be reached any more. Looked at every few seconds."""
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY:
            return False
        self._looked = now
        if not self._restarts:
            self._left = now if self._ranks() else self._left
            if now - self._left > FORSAKEN:
                tell(f"torchrun has no ranks any more and does not end: it is ended after {FORSAKEN:.0f} s")
                return True
        ending = self._ending()
        return ending is not None and ending.state == "failed" and not ending.restart

    def _tell_waiting(self, waited: float) -> None:
        """Says which machines are not here yet, while torchrun waits for them without a word."""
        if waited < self._waiting or self.nodes is None:
            return
        own, count = self.nodes
        if self._ranks():
            self._waiting = math.inf
            places.launcher_file(self.output, own).unlink(missing_ok=True)
            return
        said = places.write_json(places.launcher_file(self.output, own), {"host": socket.gethostname()})
        here = places.fresh_nodes(self.output, own, count) if said else [own]
        missing = ", ".join(str(node) for node in range(count) if node not in here)
        self._waiting = waited + BETWEEN
        if waited > self._told_at:
            self._told_at = 3 * waited
            who = f"not here yet: node {missing}" if missing else "all are here, and about to start"
            tell(f"waits for the other machines since {waited:.0f} s: {who}")

    def _stop(self) -> None:
        """Has the ranks save and end. A second Ctrl-C waits for nothing."""
        name = signal.Signals(self._signals[0]).name
        told: set[int] = set()
        deadline = time.monotonic() + self.grace
        while self._process.poll() is None and time.monotonic() < deadline and self._signals.count(signal.SIGINT) < 2:
            ranks = self._ranks()
            if told and not ranks:  # they have ended, and torchrun does so by itself
                deadline = min(deadline, time.monotonic() + self.grace / 4)
            elif not ranks or not all(one.listens or one.phase in ("saving", "done", "failed") for one in ranks):
                tell(f"{name}: there is nothing to save yet")
                break
            if not told:
                tell(f"{name}: the ranks save after their step, for which they have {self.grace:.0f} s (run.grace)")
            for one in ranks:
                if one.pid not in told and one.listens:
                    processes.end(one.pid, one.started, signal.SIGUSR1)
                    told.add(one.pid)
            time.sleep(POLL)
        self._end()

    def _end(self) -> None:
        for number, seconds in ((signal.SIGTERM, LAST_WORDS), (signal.SIGKILL, LAST_WORDS)):
            if self._process.poll() is None:
                self._process.send_signal(number)
                ends = threading.Thread(target=self._process.wait, daemon=True)
                ends.start()
                ends.join(seconds)
                # What torchrun waits for is here no longer: its ranks had their time.
                for one in self._ranks():
                    processes.end(one.pid, one.started, signal.SIGKILL)
        self._process.wait()

    def _ranks(self) -> list[Standing]:
        """The ranks of this machine that live."""
        paths = [path for folder in places.folders_of(self._process.pid) for path in places.records_in(folder)]
        found = [one for path in paths if (one := read_record(path)) is not None]
        return [one for one in found if processes.state(one.pid, one.started) != processes.GONE]

    def _told(self, code: int) -> int:
        """The exit code of the whole, and one line for people."""
        ending, deadline = self._ending(), time.monotonic() + LAST_WORDS / 2
        while ending is None and code not in (DONE, CHANGE_FIRST) and time.monotonic() < deadline:
            time.sleep(POLL)  # a monitor may still be about to say it
            ending = self._ending()
        if ending is None:
            if code == 0:
                return DONE  # a plan was printed, or all was done before
            if self._signals:
                return STOPPED
            return CHANGE_FIRST if code == CHANGE_FIRST else FAILED
        tell(summary(ending))
        return exit_code(ending)

    def _ending(self) -> Ending | None:
        """How this run ended, and not one before it."""
        ending = read_ending(self.output)
        return None if ending is None or datetime.fromisoformat(ending.time) < self._began else ending


def summary(ending: Ending) -> str:
    """One line."""
    if ending.state == "done":
        return f"done: {ending.why}"
    following = f"the same command goes on from step {ending.step}" if ending.step else "the same command starts again"
    if ending.copy > ending.step:
        following = f"the same command goes on from the copy in memory of step {ending.copy}"
    after = following if ending.restart else "something has to be changed before it can go on"
    return f"{ending.state}: {ending.why}; {after}"


def tell(message: str) -> None:
    print(f"ringattn: {message}", file=sys.stderr, flush=True)


def ends_with_this() -> Callable[[], None]:
    """Run in torchrun before it is torchrun: as this process ends it gets SIGTERM."""
    parent = os.getpid()
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):  # not Linux
        return lambda: None

    def ends() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has ended before
            os._exit(FAILED)

    return ends
