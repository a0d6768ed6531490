"""Nodes that find each other: one store, held by node 0, and waits that all end.

The processes of a preflight are its own and not torchrun's, whose rendezvous cannot say which node is missing.
"""

import json
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

TRIES = 0.3  # seconds between two attempts to reach node 0
LISTEN = 0.02  # and between two looks for a word


class NotThere(RuntimeError):
    """Something did not come in time."""


@dataclass
class Meeting:
    """This node among the others.

    Arguments:
        node, nodes: its number, and how many should come.
        store: where nodes leave word for each other, under keys of this preflight alone.
        host, port: where node 0 listens.
        address: of this node, as node 0 is reached from it.
        prefix: of all keys.
        wide: whether node 0 listens on every interface, since the endpoint's name means the loopback there.
    """

    node: int
    nodes: int
    store: dist.Store
    host: str
    port: int
    address: str
    prefix: str
    wide: bool = False

    def say(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def hear(self, key: str, deadline: float) -> Any:
        """What somebody says under a key. Raises NotThere after `deadline`, on the clock of `time.monotonic`."""
        try:
            while not self.store.check([key]):  # `wait` would write to stderr when it gives up
                if time.monotonic() > deadline:
                    raise NotThere(key)
                time.sleep(LISTEN)
            return json.loads(self.store.get(key))
        except dist.DistError as error:  # node 0 is gone, and the store with it
            raise NotThere(key) from error

    def hear_all(self, key: str, nodes: Iterable[int], deadline: float) -> dict[int, Any]:
        """What each of these nodes says under `key/NODE`; those that say nothing in time are left out."""
        heard = {}
        for node in nodes:
            with suppress(NotThere):
                heard[node] = self.hear(f"{key}/{node}", deadline)
        return heard


def meet(node: int, nodes: int, endpoint: str | None, name: str, seconds: float) -> Meeting:
    """Opens the store on node 0, at the endpoint's address only, and reaches it from the others.

    Arguments:
        endpoint: HOST:PORT of node 0; None for one node alone, which listens on the loopback.
        name: tells preflights at one endpoint apart.

    Raises NotThere if node 0 does not answer, OSError if its address or port cannot be had.
    """
    host, _, port = (endpoint or "127.0.0.1:0").rpartition(":")
    host, prefix = host.strip("[]"), f"ringattn-preflight/{name}"
    if node == 0:
        listener, wide = _listen(host, int(port), nodes)
        address, number = host, int(listener.getsockname()[1])
        store: dist.Store = dist.TCPStore(
            host,
            number,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
            timeout=_t(seconds),
        )
    else:
        wide, number = False, int(port)
        address = _reach(host, number, seconds)
        store = dist.TCPStore(host, number, is_master=False, wait_for_workers=False, timeout=_t(seconds))
    return Meeting(node, nodes, dist.PrefixStore(prefix, store), host, number, address, prefix, wide)


def _listen(host: str, port: int, nodes: int) -> tuple[socket.socket, bool]:
    """A socket that listens at the host's address. Some systems know their own name as a loopback address, which no
    other node could reach: then it listens everywhere, and the second value says so."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    wide = nodes > 1 and str(address[0]).startswith("127.") and host not in (address[0], "localhost")
    return socket.create_server(("" if wide else str(address[0]), port), family=family, backlog=1024), wide


def _reach(host: str, port: int, seconds: float) -> str:
    """Waits until node 0 listens; returns this node's address on that way."""
    deadline, last = time.monotonic() + seconds, "no attempt was made"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(5.0, left)) as connection:
                return str(connection.getsockname()[0])
        except OSError as error:
            last = error.strerror or str(error)
            time.sleep(TRIES)
    raise NotThere(f"node 0 does not answer at {host}:{port} within {seconds:.0f} s ({last})")


def _t(seconds: float) -> timedelta:
    return timedelta(seconds=seconds)
