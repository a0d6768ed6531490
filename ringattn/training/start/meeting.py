"""Where ranks meet before anything is made together: in the store that their process group will use.

Each says there what it is about to train, or why it cannot, and hears all the others. Nothing here can hang: every wait
has an end, which names who is missing.

A launcher that starts ranks again may give them the store of the ranks before, with all that these have said. So rank 0
opens a part of it that nobody has used, and every other rank asks it for the name, with a word that is its own.
"""

import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ringattn.training.ranks import listed
from ringattn.training.start.launched import Launch, detect

HEARD = 5.0  # seconds that a rank which cannot start waits for rank 0 to say so
NEWS = 30.0  # seconds between words about who is waited for
ROOM = "ringattn/meeting"
REFUSED, ARRIVED, SAID, LEFT, HELLO = "refused", "arrived", "said", "left", "hello"
LOOPBACK = ("127.0.0.1", "localhost")
NOBODY = "nobody"  # refused: somebody is missing


class CannotStart(ValueError):
    """A rank cannot start, or is not there: every rank that came raises it with the same message."""

    restart = False


class Missing(CannotStart):
    """Ranks did not come in time; they may the next time."""

    restart = True


class Meeting:
    """All ranks of one start of a run. Made by every rank, in any order; it waits for rank 0.

    Arguments:
        seconds: of every wait.

    Raises Missing if rank 0 does not come.
    """

    def __init__(self, launch: Launch, seconds: float) -> None:
        self._launch, self._seconds = launch, seconds
        self._lobby = _open(launch, seconds)
        self._greeted = 0
        name = uuid.uuid4().hex
        if launch.rank:
            place = self._lobby.add(HELLO, 1)
            self._lobby.set(f"{HELLO}/{place}", name)
            if not _until(lambda: self._lobby.check([name]), seconds):
                raise Missing(f"rank 0 did not come within run.start_timeout={seconds:g} s")
            name = self._lobby.get(name).decode()
        self.store = dist.PrefixStore(name, self._lobby)
        self._name = name

    def everyone(self, mine: str) -> list[str]:
        """What all ranks say, in their order. Every rank calls it.

        Arguments:
            mine: what this rank says: short, since every rank reads that of all.

        Raises CannotStart with the words of a rank that `refuse`d, and Missing naming those who did not come.
        """
        store, launch = self.store, self._launch
        store.set(f"mine/{launch.rank}", mine)
        store.add(ARRIVED, 1)
        began = told = time.monotonic()
        pause = 0.02
        while True:
            self._greet()
            waited = time.monotonic() - began
            # Counted before the look at refusals: whoever refuses says so first, and is counted then.
            arrived = store.add(ARRIVED, 0)
            if waited > self._seconds and arrived < launch.world_size:
                late = f"{self._missing()} did not come within run.start_timeout={self._seconds:g} s"
                store.compare_set(REFUSED, "", f"{NOBODY}\n{late}")
            if store.check([REFUSED]):
                who, _, message = store.get(REFUSED).decode().partition("\n")
                self.leave()
                raise Missing(message) if who == NOBODY else CannotStart(f"rank {who} cannot start: {message}")
            if arrived >= launch.world_size:
                return [word.decode() for word in store.multi_get(self._of_all("mine"))]
            if launch.rank == 0 and time.monotonic() - told > NEWS:
                told = time.monotonic()
                print(f"waiting for {self._missing()} since {waited:.0f} s", file=sys.stderr, flush=True)
            time.sleep(pause)
            pause = min(0.5, 1.5 * pause)

    def details(self, mine: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The long words of all ranks, for when the short ones differ. Every rank calls it."""
        self.store.set(f"whole/{self._launch.rank}", json.dumps(mine, default=str))
        self.store.wait(self._of_all("whole"), timedelta(seconds=self._seconds))
        return [json.loads(word) for word in self.store.multi_get(self._of_all("whole"))]

    def refuse(self, message: str) -> bool:
        """Says that this rank cannot start, and why; whether rank 0 tells the user, or is this one."""
        self.store.compare_set(REFUSED, "", f"{self._launch.rank}\n{message}")
        self.store.add(ARRIVED, 1)
        if self._launch.rank:
            heard = _until(lambda: self.store.check([SAID]), HEARD)
        else:
            heard = True
        self.leave()
        return heard

    def leave(self) -> None:
        """Before a rank ends because of what it has heard: rank 0, who may hold the store, waits until others have."""
        with suppress(RuntimeError):
            self.store.add(LEFT, 1)
            if self._launch.rank == 0:
                self.store.set(SAID, "")
                _until(lambda: self._greet() or self.store.add(LEFT, 0) >= self._launch.world_size, HEARD)

    def join(self) -> None:
        """The default process group, in the same store, with torch's backend for each kind of device. Collective.

        Ranks of one machine, which meet on its loopback, talk there too.
        """
        if self._launch.world_size == self._launch.ranks_per_node and self._launch.master_addr in LOOPBACK:
            _talk_on_loopback()
        store = dist.PrefixStore("group", self.store)
        dist.init_process_group(store=store, rank=self._launch.rank, world_size=self._launch.world_size)

    def _greet(self) -> bool:
        """Rank 0 tells those who have asked where the others are; those of an earlier start may have asked, too."""
        if self._launch.rank == 0:
            count = self._lobby.add(HELLO, 0)
            while self._greeted < count:
                self._greeted += 1
                self._lobby.set(self._lobby.get(f"{HELLO}/{self._greeted}").decode(), self._name)
        return False

    def _missing(self) -> str:
        ranks = range(self._launch.world_size)
        return listed([rank for rank in ranks if not self.store.check([f"mine/{rank}"])])

    def _of_all(self, what: str) -> list[str]:
        return [f"{what}/{rank}" for rank in range(self._launch.world_size)]


def cannot(message: str) -> bool:
    """Tells the other ranks that this one cannot start, and why. True if rank 0 says it for this one, or is this one.

    Takes no longer than some seconds, also where nobody listens.
    """
    try:
        launch = detect(os.environ)
        return launch.rank == 0 if launch.world_size == 1 else Meeting(launch, HEARD).refuse(message)
    except (ValueError, RuntimeError, OSError):
        return False


def _until(happened: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _open(launch: Launch, seconds: float) -> dist.Store:
    """The store of the run: torchrun's agent holds it, else rank 0 does.

    Raises Missing if nobody listens in time, and CannotStart if rank 0 cannot listen.
    """
    holds = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not holds:
        _wait_for_listener(launch, seconds)
    try:
        store = dist.TCPStore(
            launch.master_addr,
            launch.master_port,
            launch.world_size,
            is_master=holds,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            master_listen_fd=_listener(launch) if holds else None,
        )
    except (OSError, dist.DistNetworkError) as error:
        told = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise CannotStart(f"rank {launch.rank} cannot meet at {_address(launch)}: {told}") from None
    return dist.PrefixStore(ROOM, store)


def _address(launch: Launch) -> str:
    return f"{launch.master_addr}:{launch.master_port}"


def _listener(launch: Launch) -> int | None:
    """A socket that listens on loopback alone, where all ranks are on one machine and meet there: torch's own (None)
    would listen on every address."""
    if launch.world_size != launch.ranks_per_node or launch.master_addr not in LOOPBACK:
        return None
    with socket.create_server(("127.0.0.1", launch.master_port), backlog=4096) as listening:
        return listening.detach()


def _talk_on_loopback() -> None:
    """gloo and NCCL listen there alone, where nothing outside can reach them, unless the user chose an interface."""
    name = next((name for name in ("lo", "lo0") if Path("/sys/class/net", name).exists()), None)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def _wait_for_listener(launch: Launch, seconds: float) -> None:
    """torch itself writes warnings about every attempt."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((launch.master_addr, launch.master_port), timeout=2.0):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise Missing(
                    f"nobody listens at {_address(launch)} within run.start_timeout={seconds:g} s: {error}"
                ) from None
        time.sleep(0.1)
