"""Where ranks meet: those of one machine on its loopback alone, which nothing outside of it can reach."""

import os
import socket
from pathlib import Path

import torch.distributed as dist

from ringattn.training.health.rank import Health
from ringattn.training.launched import Launch

LOOPBACK = ("127.0.0.1", "localhost")


def meet(launch: Launch, health: Health) -> None:
    """Opens the default process group of a run. Collective.

    torch's store listens on all addresses of a machine, whatever its host is called, unless it is handed a socket that
    does not.
    """
    health.record.at("joining")
    if not dist.is_initialized() and launch.world_size > 1:
        alone = launch.world_size == launch.ranks_per_node and launch.master_addr in LOOPBACK
        if alone:
            _talk_on_loopback()
        # torchrun may hold the store itself, with all that ranks which it started before have left there.
        agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = _store(launch) if alone and not agents else next(dist.rendezvous("env://"))[0]
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"ringattn-{start}", store)
        dist.init_process_group(store=store, rank=launch.rank, world_size=launch.world_size)
    if dist.is_initialized():
        health.joined()
    health.record.at("starting")


def _store(launch: Launch) -> dist.TCPStore:
    address, port = "127.0.0.1", launch.master_port
    descriptor = None
    if launch.rank == 0:
        with socket.socket() as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((address, port))
            listening.listen(launch.world_size)
            descriptor = listening.detach()
    return dist.TCPStore(
        address, port, launch.world_size, is_master=launch.rank == 0, wait_for_workers=False,
        master_listen_fd=descriptor,
    )  # fmt: skip


def _talk_on_loopback() -> None:
    """gloo and NCCL listen there too, unless the user chose an interface."""
    name = next((name for name in ("lo", "lo0") if Path("/sys/class/net", name).exists()), None)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
