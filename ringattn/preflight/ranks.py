"""The processes of a node that test its devices and links, seen from the node: what they told, and for how long they
are waited for."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ringattn
from ringattn.preflight.rank import MARK

TAIL = 2000  # bytes at the end of stderr that may say why a process ended


class RankProcess:
    """One of them. Use `close` whatever happens."""

    def __init__(self, device: str, number: int) -> None:
        self.device, self.number = device, number
        self.error: str | None = None
        self._heard: list[dict[str, Any]] = []
        self._more = threading.Condition()
        self._ended = False
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ringattn.preflight.rank", device, str(number)],
            env=environment(device),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            start_new_session=True,  # Ctrl-C is for the node, which ends its ranks
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                with self._more:
                    self._heard.append(json.loads(line.removeprefix(MARK)))
                    self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()

    def wait_for(self, phase: str, deadline: float) -> bool:
        """Whether it told of a phase before the deadline; if not, `error` says what it was doing, and it is killed."""
        with self._more:
            while self.error is None and phase not in (phases := [word["phase"] for word in self._heard]):
                if "failed" in phases:
                    self.error = self._heard[phases.index("failed")]["error"]
                elif self._ended:
                    self.error = self._why_ended()
                elif not self._more.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    self.error = f"no answer {_after(phases)}"
        if self.error is not None:
            self.close()
        return self.error is None

    def _why_ended(self) -> str:
        code = self._process.wait()
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - TAIL))
        lines = self._stderr.read().decode(errors="replace").strip().splitlines() or ["nothing was said"]
        return f"its process ended with exit code {code}: {lines[-1]}"

    def measure_links(self, task: dict[str, Any]) -> None:
        """Lets it go on with a task of `rank.measure_links`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
        except OSError:  # it has ended, which `wait_for` tells
            return

    def report(self) -> dict[str, Any]:
        """What is known of it."""
        words = {word["phase"]: word for word in self._heard}
        links = [word for word in self._heard if word["phase"] == "linked"]
        begun = [word["peer"] for word in self._heard if word["phase"] == "link"]
        return {
            "number": self.number,
            "device": words.get("device", {}).get("name"),
            "memory": words.get("memory"),
            "product": words.get("product"),
            "links": links,
            "waits_for": begun[-1] if len(begun) > len(links) else None,
            "error": self.error,
        }

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None and not self._process.stdin.closed:
            with suppress(OSError):
                self._process.stdin.close()


class Doctor:
    """`ringattn doctor` in a process of its own, since a kernel that hangs must not hang the preflight."""

    def __init__(self, device: str) -> None:
        command = [sys.executable, "-m", "ringattn", "doctor", "--json", "--device", device]
        self._out = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process
        self._process = subprocess.Popen(
            command, env=environment(device), stdout=self._out, stderr=subprocess.DEVNULL, start_new_session=True
        )

    def report(self, deadline: float) -> dict[str, Any]:
        """The kernel that trains attention here, or why there is none."""
        try:
            self._process.wait(max(0.1, deadline - time.monotonic()))
            self._out.seek(0)
            found = json.loads(self._out.read())
        except subprocess.TimeoutExpired:
            return {"auto": None, "problem": "ringattn doctor does not end"}
        except ValueError:
            return {"auto": None, "problem": f"ringattn doctor ended with exit code {self._process.returncode}"}
        return {"auto": found["auto"], "problem": found["problem"]}

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def start_ranks(device: str, count: int) -> list[RankProcess]:
    return [RankProcess(device, number) for number in range(count)]


def wait_for_all(ranks: Sequence[RankProcess], phase: str, deadline: float) -> bool:
    """Whether all of them came to a phase."""
    came = [rank.wait_for(phase, deadline) for rank in ranks]  # of each, so that each can say why not
    return all(came)


def environment(device: str) -> dict[str, str]:
    """Of a process that finds this package where this one did. On CPUs one thread each: products must be alike."""
    paths = [str(Path(ringattn.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    changed = {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    if device == "cpu":
        changed |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **changed}


def _after(phases: Sequence[str]) -> str:
    doing = {
        "device": "while its memory was tested",
        "memory": "while matrices were multiplied",
        "product": "after its own tests",
        "joining": "while its process group was made",
        "link": "while it waited for a peer",
        "linked": "between two links",
    }
    return doing.get(phases[-1], "at its end") if phases else "before it could name its device"
