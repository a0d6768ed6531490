"""All ranks in one process, a thread each, with a network that meets at a barrier: quick enough for hypothesis."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ringattn.recurrent.wire import Arriving, Here


class Meeting:
    """Where the threads of all ranks leave what they send. A rank that fails breaks it for all.

    One thread runs at a time, until it meets the others: kernels are written for processes of one thread (Triton keeps
    the arguments of a call in the kernel while it tunes it).
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        # On a GPU the others wait while one compiles.
        self.barrier = threading.Barrier(ranks, timeout=300 if torch.cuda.is_available() else 60)
        self.turn = threading.Lock()
        self.left: list[Any] = [None] * ranks

    def swap(self, rank: int, value: Any) -> list[Any]:
        """What every rank left, in the order of ranks."""
        self.left[rank] = value
        self._meet()
        found = list(self.left)
        self._meet()
        return found

    def _meet(self) -> None:
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()


class ThreadWire:
    """The `Wire` of one rank; `calls` counts its collectives."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank, self.calls = meeting, rank, 0

    def start(self, send: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Arriving:
        """It arrives at once, but is given to who waits for it alone."""
        return Here(self.exchange(send, sends, receives))

    def exchange(self, send: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        self.calls += 1
        assert sum(sends) == len(send)
        found = self.meeting.swap(self.rank, send.clone().split(list(sends)))
        parts = [parts[self.rank] for parts in found]
        assert [len(part) for part in parts] == list(receives)
        return torch.cat(parts)


def on_ranks(ranks: int, function: Callable[[int, ThreadWire], Any]) -> list[Any]:
    """`function(rank, wire)` on every rank, in turns; its results in the order of ranks."""
    meeting = Meeting(ranks)

    def work(rank: int) -> Any:
        # A GPU's backward passes would all run in the one thread that torch has for it, and wait there for each other.
        with torch.autograd.set_multithreading_enabled(False), meeting.turn:
            try:
                return function(rank, ThreadWire(meeting, rank))
            except BaseException:
                meeting.barrier.abort()
                raise

    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(work, rank) for rank in range(ranks)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        broken = threading.BrokenBarrierError
        if errors:  # that of the rank that failed first, not of those that waited for it
            raise next((error for error in errors if not isinstance(error, broken)), errors[0])
        return [future.result() for future in futures]
