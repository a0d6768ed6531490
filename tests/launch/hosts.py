"""Two "hosts" on this machine: network namespaces with their own loopback, joined by one link that can be bad.

Processes of a host see its interfaces only, so that what they listen on and where they connect to is that of two
machines; files they share, as machines share a file system.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

INTERFACE = "link0"
OVER_THE_LINK = {
    "GLOO_SOCKET_IFNAME": INTERFACE
}  # for ranks of both hosts: the name of this machine means the loopback
SHORT_QUEUE = "burst", "16kb", "limit", "24kb"
ADDRESSES = ("10.213.77.1", "10.213.77.2")


def unavailable() -> str | None:
    """Why there can be no hosts here, or None."""
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "iproute2 is not installed"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"ringattn-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return f"ip netns add: {made.stderr.strip()}" if made.returncode else None


class Hosts:
    """The two, numbered 0 and 1. Use as a context manager, which ends their processes too."""

    def __init__(self) -> None:
        self.names = tuple(f"ringattn-{os.getpid()}-{number}" for number in range(2))

    def __enter__(self) -> "Hosts":
        try:
            for name in self.names:
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
            first, second = self.names
            _ip("-n", first, "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", second)
            for name, address in zip(self.names, ADDRESSES, strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
                _ip("-n", name, "link", "set", INTERFACE, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for number, name in enumerate(self.names):
            self.kill(number)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def start(
        self, host: int, command: list[str], environment: dict[str, str], folder: Path, log: Path
    ) -> "subprocess.Popen[bytes]":
        """Starts a command on a host; what it writes is added to `log`."""
        with log.open("ab") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *command],
                cwd=folder,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self, host: int, *command: str) -> str:
        done = subprocess.run(["ip", "netns", "exec", self.names[host], *command], capture_output=True, text=True)
        return done.stdout + done.stderr

    def disturb(self, rate: str) -> str:
        """Makes the link slow and lossy in both directions, at a rate as tc writes it; returns what was done.

        tc's netem delays packets and loses some by chance. Kernels without it have a token bucket, here with a queue
        too short for the bursts of a transfer: packets wait in it, and what does not fit is lost.
        """
        kinds = (["netem", "delay", "2ms", "1ms", "loss", "0.3%", "rate", rate], ["tbf", "rate", rate, *SHORT_QUEUE])
        for kind in kinds:
            added = [
                subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root", *kind], capture_output=True)
                for name in self.names
            ]
            if not any(done.returncode for done in added):
                return " ".join(kind)
        raise RuntimeError(f"tc has neither netem nor tbf: {added[0].stderr.decode()}")

    def lost(self) -> int:
        """Packets that the link has dropped so far."""
        dropped = 0
        for name in self.names:
            shown = subprocess.run(["tc", "-n", name, "-s", "qdisc"], capture_output=True, text=True).stdout
            dropped += sum(int(count) for count in re.findall(r"dropped (\d+)", shown))
        return dropped

    def cut(self) -> None:
        """Takes the link away: nothing arrives any more, and nobody is told."""
        _ip("-n", self.names[1], "link", "set", INTERFACE, "down")

    def join(self) -> None:
        _ip("-n", self.names[1], "link", "set", INTERFACE, "up")

    def processes(self, host: int) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", self.names[host]], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]

    def kill(self, host: int) -> None:
        """Ends every process of a host at once, as if it had lost its power."""
        for _ in range(50):
            pids = self.processes(host)
            if not pids:
                return
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
