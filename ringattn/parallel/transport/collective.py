"""Transfers by the all-to-all of a process group: gloo or NCCL."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from ringattn.parallel.plan.route import Route
from ringattn.parallel.transport.process_groups import CLOSED
from ringattn.parallel.transport.protocol import Pending


class _Work:
    """Owns the work of an exchange and the tensors that it uses, until the wait."""

    def __init__(self, work: dist.Work, tensors: Sequence[Tensor]) -> None:
        self._work: dist.Work | None = work
        self._tensors = list(tensors)

    def wait(self) -> None:
        # gloo hangs when a work is waited for twice.
        assert self._work is not None, "a transfer is waited for once"
        self._work.wait()
        self._work = None
        self._tensors.clear()


class GroupTransport:
    """The all-to-all of one process group, on any device: gloo and NCCL."""

    name = "collective"

    def __init__(self, group: dist.ProcessGroup, reason: str = "") -> None:
        self.group = group
        self.reason = reason
        self.closed = False

    def buffer(self, route: Route, like: Tensor) -> Tensor:
        return like.new_empty(route.sent)

    def message(self, x: Tensor, route: Route) -> Tensor:
        return x

    def exchange(self, send: Tensor, receive: Tensor, route: Route) -> Pending:
        if self.closed:
            raise ValueError(CLOSED)
        # A mismatch between two ranks aborts every process; one between a rank's own numbers can be told here.
        assert (send.numel(), receive.numel()) == (route.sent, route.received), (send.shape, receive.shape, route)
        sizes = list(route.receives), list(route.sends)
        return _Work(dist.all_to_all_single(receive, send, *sizes, group=self.group, async_op=True), [send, receive])

    def close(self) -> None:
        self.closed = True
        del self.group
