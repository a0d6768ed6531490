"""A transport whose data is late: who reads it before the wait, or writes what is being sent, gets wrong results."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ringattn.parallel.execution.job import Job
from ringattn.parallel.plan.route import Route
from ringattn.parallel.transport.protocol import Pending, Transport
from ringattn.parallel.transport.symmetric import SymmetricTransport

CYCLES = 5_000_000  # of a GPU: some milliseconds, longer than any kernel of these tests


class Late:
    """On GPUs transfers start some milliseconds after they were posted, on CPUs at the wait. None is pulled: that would
    be at the wait too."""

    def __init__(self, inner: Transport) -> None:
        self.inner, self.name, self.reason = inner, inner.name, inner.reason
        self.exchanges = 0

    def buffer(self, route: Route, like: Tensor) -> Tensor:
        with copied(self.inner):
            return self.inner.buffer(route, like)

    def message(self, x: Tensor, route: Route) -> Tensor:
        with copied(self.inner):
            return self.inner.message(x, route)

    def exchange(self, send: Tensor, receive: Tensor, route: Route) -> Any:
        with copied(self.inner):
            return self._exchange(send, receive, route)

    def _exchange(self, send: Tensor, receive: Tensor, route: Route) -> Any:
        self.exchanges += 1
        receive.fill_(float("nan"))
        if not send.is_cuda:
            return _AtTheWait(self.inner, send, receive, route)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(CYCLES)
            return self.inner.exchange(send, receive, route)


@contextmanager
def copied(transport: Transport) -> Iterator[None]:
    """Nothing is so short that it is pulled."""
    if not isinstance(transport, SymmetricTransport):
        yield
        return
    before, transport.pulled = transport.pulled, -1
    try:
        yield
    finally:
        transport.pulled = before


class _AtTheWait:
    def __init__(self, *posted: Any) -> None:
        self.posted = posted

    def wait(self) -> None:
        inner, *rest = self.posted
        pending: Pending = inner.exchange(*rest)
        pending.wait()


def late(jobs: Sequence[Job]) -> list[Job]:
    """The same jobs with late transports."""
    return [replace(job, ring=job.ring and Late(job.ring), ulysses=job.ulysses and Late(job.ulysses)) for job in jobs]
