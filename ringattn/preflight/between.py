"""What nodes look at together: their clocks, a folder that all should see, and whether each reaches each other."""

import shutil
import socket
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

from ringattn.preflight.meeting import Meeting, NotThere

PINGS = 5
PATIENCE = 15.0
"""Seconds that a network file system may take to show a file of another node: clients cache what is not there."""
CONNECT = 5.0
HELLO = b"ringattn preflight\n"


def answer_clock(meeting: Meeting, deadline: float) -> None:
    """A node's part of `ask_clocks`."""
    for ping in range(PINGS):
        meeting.hear(f"clock/{meeting.node}/ask/{ping}", deadline)
        meeting.say(f"clock/{meeting.node}/tell/{ping}", time.time())


def ask_clocks(meeting: Meeting, others: list[int], deadline: float) -> dict[int, dict[str, float] | None]:
    """Of each node the seconds that its clock is ahead of node 0's, and how far off that may be; None: no answer.

    As in NTP the answer is taken to be of the middle between question and arrival, and the fastest of several counts.
    """
    found: dict[int, dict[str, float] | None] = {}
    for node in others:
        best = None
        with suppress(NotThere):
            for ping in range(PINGS):
                asked = time.time()
                meeting.say(f"clock/{node}/ask/{ping}", 0)
                told = meeting.hear(f"clock/{node}/tell/{ping}", deadline)
                arrived = time.time()
                half = (arrived - asked) / 2
                if best is None or half < best["error"]:
                    best = {"ahead": told - asked - half, "error": half}
        found[node] = best
    return found


def write_sign(meeting: Meeting, output: Path) -> str | None:
    """Leaves a file of this node in a folder of the preflight in `output`; why that failed, or None."""
    folder = _signs(meeting, output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"node-{meeting.node}").write_text(meeting.address)
    except OSError as error:
        return error.strerror or str(error)
    return None


def see_signs(meeting: Meeting, output: Path, nodes: list[int]) -> list[int]:
    """The nodes whose files are not seen here, after some patience."""
    folder, deadline = _signs(meeting, output), time.monotonic() + PATIENCE
    unseen = list(nodes)
    while unseen and time.monotonic() < deadline:
        unseen = [node for node in unseen if not (folder / f"node-{node}").is_file()]
        if unseen:
            time.sleep(0.2)
    return unseen


def remove_signs(meeting: Meeting, output: Path) -> None:
    shutil.rmtree(_signs(meeting, output), ignore_errors=True)


def _signs(meeting: Meeting, output: Path) -> Path:
    return output.expanduser().resolve() / f".preflight-{meeting.prefix.rpartition('/')[2]}"


class Door:
    """A port of this node that greets whoever connects, so that others can see whether they reach it."""

    def __init__(self, meeting: Meeting) -> None:
        family = socket.getaddrinfo(meeting.address, 0, type=socket.SOCK_STREAM)[0][0]
        at = "" if meeting.wide else meeting.address
        self._listener = socket.create_server((at, 0), family=family, backlog=1024)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._greet, daemon=True).start()

    def _greet(self) -> None:
        while True:
            try:
                visitor, _ = self._listener.accept()
            except OSError:  # it was closed
                return
            with suppress(OSError), closing(visitor):
                visitor.settimeout(CONNECT)
                visitor.sendall(HELLO)

    def close(self) -> None:
        self._listener.close()


def knock(doors: dict[int, tuple[str, int]]) -> dict[int, str]:
    """The nodes that cannot be reached at their doors, each with the reason."""
    failed = {node: f"{address}:{port}: no greeting within {CONNECT:.0f} s" for node, (address, port) in doors.items()}

    def visit(node: int, address: str, port: int) -> None:
        try:
            with socket.create_connection((address, port), timeout=CONNECT) as connection:
                if connection.recv(len(HELLO), socket.MSG_WAITALL) == HELLO:
                    del failed[node]
                else:
                    failed[node] = f"{address}:{port}: somebody else answers"
        except OSError as error:
            failed[node] = f"{address}:{port}: {error.strerror or error}"

    visits = [threading.Thread(target=visit, args=(node, *door), daemon=True) for node, door in doors.items()]
    for thread in visits:
        thread.start()
    for thread in visits:
        thread.join(3 * CONNECT)
    return failed
