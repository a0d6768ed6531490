"""One rank of a preflight, a process of its own: `python -m ringattn.preflight.rank DEVICE NUMBER`.

It tests its device, tells what it found, and reads one line: whom to measure links with. What it tells are lines of
JSON on stdout behind a mark, since libraries write there too. A process of its own, because a device or a link that
hangs takes its process with it: whoever started it waits no longer than it wants and then ends it.
"""

import json
import os
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ringattn.preflight.device import check_memory, check_product, name_of
from ringattn.preflight.pairs import Place

MARK = "@preflight "
SMALL = 64  # bytes, for the latency
LARGE = {"cuda": 1 << 28, "cpu": 1 << 21}
TIMES_SMALL, TIMES_LARGE = 20, 5


def main(arguments: list[str]) -> int:
    try:
        device = torch.device("cuda", int(arguments[1])) if arguments[0] == "cuda" else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        tell("device", name=name_of(device))
        tell("memory", **check_memory(device))
        if device.type == "cuda":
            torch.cuda.empty_cache()  # NCCL needs room of its own
        tell("product", **check_product(device))
        line = sys.stdin.readline()
        if line.strip():
            measure_links(json.loads(line), device)
        tell("done")
    except Exception as error:
        tell("failed", error=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
        return 1
    return 0


def tell(phase: str, **found: Any) -> None:
    print(MARK + json.dumps({"phase": phase, **found}), flush=True)


def measure_links(task: dict[str, Any], device: torch.device) -> None:
    """Measures this rank's links one after the other, each at the same time as its peer."""
    place = Place(task["node"], task["local"], tuple(task["counts"]))
    seconds = timedelta(seconds=task["seconds"])
    store = dist.TCPStore(task["host"], task["port"], is_master=False, wait_for_workers=False, timeout=seconds)
    tell("joining")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(task["prefix"], store),
        rank=place.rank,
        world_size=sum(place.counts),
        timeout=seconds,
        device_id=device if device.type == "cuda" else None,
    )
    dist.barrier()  # a point-to-point transfer must not be the first that a group does
    for peer in place.peers():
        tell("link", peer=[peer.node, peer.local])
        small = exchanged(peer.rank, SMALL, TIMES_SMALL, device)
        large = exchanged(peer.rank, LARGE[device.type], TIMES_LARGE, device)
        tell("linked", peer=[peer.node, peer.local], small=small, large=large, bytes=LARGE[device.type])
    dist.destroy_process_group()


def exchanged(peer: int, size: int, times: int, device: torch.device) -> float:
    """Seconds to send `size` bytes to a rank and receive as many: the best of several, since hosts may be busy."""
    sent, received = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    best = float("inf")
    for number in range(times + 1):
        begin = time.perf_counter()
        operations = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number:  # the first opens the connection, and waits for the peer
            best = min(best, time.perf_counter() - begin)
    return best


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # a process group that has failed may hang where it is taken down
