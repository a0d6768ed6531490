"""Where ranks meet before anything is made together: in the store that their process group will use.

Each says there what it is about to train, or why it cannot, and hears all the others. Nothing here can hang: every wait
has an end, which names who is missing.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ringattn.training.launched import Launch, detect
from ringattn.training.ranks import listed

HEARD = 5.0  # seconds that a rank which cannot start waits for rank 0 to say so
NEWS = 30.0  # seconds between words about who is waited for
PREFIX = "ringattn/meeting"
REFUSED, ARRIVED, SAID, LEFT = "refused", "arrived", "said", "left"
NOBODY = "nobody"  # refused: somebody is missing


class CannotStart(ValueError):
    """A rank cannot start, or is not there: every rank that came raises it with the same message."""

    restart = False


class Missing(CannotStart):
    """Ranks did not come in time; they may the next time."""

    restart = True


def everyone(launch: Launch, mine: str, seconds: float) -> tuple[dist.Store, list[str]]:
    """What all ranks say, in their order, and the store. Every rank of a run of several calls it.

    Arguments:
        mine: what this rank says: short, since every rank reads that of all.
        seconds: until all have to be there.

    Raises CannotStart with the words of a rank that has said `cannot`, and Missing naming those who did not come.
    """
    store = _open(launch, seconds)
    store.set(f"mine/{launch.rank}", mine)
    store.add(ARRIVED, 1)
    began = told = time.monotonic()
    pause = 0.02
    while store.add(ARRIVED, 0) < launch.world_size or store.check([REFUSED]):
        now = time.monotonic()
        if now - began > seconds:
            late = f"{_missing(store, launch)} did not come within run.start_timeout={seconds:g} s"
            store.compare_set(REFUSED, "", f"{NOBODY}\n{late}")
        if store.check([REFUSED]):
            who, _, message = store.get(REFUSED).decode().partition("\n")
            leave(store, launch)
            raise Missing(message) if who == NOBODY else CannotStart(f"rank {who} cannot start: {message}")
        if launch.rank == 0 and now - told > NEWS:
            print(f"waiting for {_missing(store, launch)} since {now - began:.0f} s", file=sys.stderr, flush=True)
            told = now
        time.sleep(pause)
        pause = min(0.5, 1.5 * pause)
    return store, [word.decode() for word in store.multi_get([f"mine/{rank}" for rank in range(launch.world_size)])]


def details(store: dist.Store, launch: Launch, mine: Mapping[str, Any], seconds: float) -> list[dict[str, Any]]:
    """The long words of all ranks, for when the short ones differ."""
    store.set(f"whole/{launch.rank}", json.dumps(mine, default=str))
    keys = [f"whole/{rank}" for rank in range(launch.world_size)]
    store.wait(keys, timedelta(seconds=seconds))
    return [json.loads(word) for word in store.multi_get(keys)]


def leave(store: dist.Store, launch: Launch) -> None:
    """Before a rank ends because of what it has heard: the one that holds the store waits for the others to read."""
    with suppress(RuntimeError):
        store.add(LEFT, 1)
        if launch.rank == 0:
            store.set(SAID, "")
        if _holds(launch):
            _until(lambda: store.add(LEFT, 0) >= launch.world_size, HEARD)


def join(store: dist.Store, launch: Launch) -> None:
    """The default process group, in the same store, with torch's backend for each kind of device."""
    group_store = dist.PrefixStore("group", store)
    dist.init_process_group(store=group_store, rank=launch.rank, world_size=launch.world_size)


def cannot(message: str) -> bool:
    """Tells the other ranks that this one cannot start, and why. True if rank 0 says it for this one, or is this one.

    Takes no longer than some seconds, also where nobody listens.
    """
    try:
        launch = detect(os.environ)
        if launch.world_size == 1:
            return launch.rank == 0
        store = _open(launch, HEARD)
        store.compare_set(REFUSED, "", f"{launch.rank}\n{message}")
        store.add(ARRIVED, 1)
        if launch.rank == 0:
            store.set(SAID, "")
        said = _until(lambda: store.check([SAID]), HEARD)
        leave(store, launch)
    except (ValueError, RuntimeError, OSError):
        return False
    return said


def _until(happened: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _missing(store: dist.Store, launch: Launch) -> str:
    return listed([rank for rank in range(launch.world_size) if not store.check([f"mine/{rank}"])])


def _holds(launch: Launch) -> bool:
    """Whether the store lives in this process: torchrun's agent has its own."""
    return launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _open(launch: Launch, seconds: float) -> dist.Store:
    """The store of this start of the run. Raises Missing if nobody listens in time."""
    if not _holds(launch):
        _wait_for_listener(launch, seconds)
    store = dist.TCPStore(
        launch.master_addr,
        launch.master_port,
        launch.world_size,
        is_master=_holds(launch),
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
        multi_tenant=True,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"{PREFIX}/{attempt}", store)


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
                    f"rank 0 does not listen at {launch.master_addr}:{launch.master_port} within "
                    f"run.start_timeout={seconds:g} s: {error}"
                ) from None
        time.sleep(0.1)
