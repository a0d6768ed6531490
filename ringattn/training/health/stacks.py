"""Python stacks of ranks, as faulthandler writes them: whether a rank waits for others, and where its own code is."""

import re
import shutil
import signal
import subprocess
from dataclasses import dataclass

# A signal that nobody else uses: real-time signals have no meaning of their own.
SIGNAL = signal.SIGRTMIN + 6 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR2
_FRAME = re.compile(r'  File "(?P<file>[^"]+)", line (?P<line>\d+|\?\?\?) in (?P<name>.+)')
# Where a rank stands that waits for others.
_WAITS = ("torch/distributed/", "ringattn/parallel/transport/", "torch/nn/parallel/", "deepspeed/comm/")
_CRASHED = re.compile(r"Fatal Python error: ([^\n]+)")
_OUTSIDE = ("/site-packages/", "/dist-packages/", "/lib/python", "<frozen ", "<string>")


@dataclass(frozen=True)
class Stack:
    """What the stacks of a rank say.

    Arguments:
        waits: whether one of its threads is in a collective.
        call: the function of torch.distributed that it is in, "" if it is in none.
        where: the innermost place outside of libraries in the thread that waits, else in the main thread.
        crashed: what Python says of a crash, "" without one.
    """

    waits: bool
    call: str
    where: str
    crashed: str = ""

    def plain(self) -> dict[str, object]:
        return {"waits": self.waits, "call": self.call, "where": self.where, "crashed": self.crashed}


def read_stacks(text: str) -> Stack:
    """What one dump says."""
    crashed = _CRASHED.search(text)
    threads: list[list[re.Match[str]]] = []
    main: list[re.Match[str]] = []
    for line in text.splitlines():
        if line.startswith(("Thread 0x", "Current thread 0x")):
            threads.append([])
        elif threads and (frame := _FRAME.fullmatch(line)):
            threads[-1].append(frame)
    # The main thread was made first and is written last.
    main = threads[-1] if threads else []
    for thread in [main, *reversed(threads[:-1])]:
        waiting = [frame for frame in thread if any(place in frame["file"] for place in _WAITS)]
        if waiting and waiting[0] in thread[:6]:
            return Stack(True, _called(waiting), _own_place(thread), crashed[1] if crashed else "")
    return Stack(False, "", _own_place(main), crashed[1] if crashed else "")


def from_outside(pid: int) -> str:
    """The stacks of a process that cannot write them itself, by py-spy where it is installed; else ""."""
    program = shutil.which("py-spy")
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, "dump", "--pid", str(pid), "--nonblocking"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _called(frames: list[re.Match[str]]) -> str:
    """The collective, such as all_reduce, from the frames of torch.distributed."""
    named = [frame for frame in frames if frame["name"] not in ("wrapper", "inner", "<lambda>")]
    collectives = [frame["name"] for frame in named if frame["file"].endswith("distributed_c10d.py")]
    return (collectives or [frame["name"] for frame in reversed(named)] or ["?"])[0]


def _own_place(frames: list[re.Match[str]]) -> str:
    for frame in frames:
        if not any(place in frame["file"] for place in _OUTSIDE):
            file = "/".join(frame["file"].split("/")[-3:])
            return f"{file}:{frame['line']} {frame['name']}"
    return ""
