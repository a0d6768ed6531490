"""Moving messages between the ranks of one mesh axis: fill a buffer, exchange, wait once.

There is one primitive, the uneven all-to-all: casts and reduces of keys and the exchange of heads are all messages laid
end to end, one for each rank. What is in them is the plan's business; a transport only moves what it is given.
"""

from collections.abc import Sequence
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from ringattn.parallel.plan import Route
from ringattn.parallel.process_groups import CLOSED


class Pending(Protocol):
    """A transfer under way. `wait` may be called once, on the stream that will use the data."""

    def wait(self) -> None: ...


class Transport(Protocol):
    """What the executor asks of a transport. Both calls are collective over the axis, in the same order on every rank.

    `name` and `reason` tell what moves the data, and why it is not something faster.
    """

    name: str
    reason: str

    def buffer(self, route: Route, like: Tensor) -> Tensor:
        """A flat tensor of `route.sent` elements, of dtype and device of `like`, for the next `exchange`."""

    def message(self, x: Tensor, route: Route) -> Tensor:
        """A flat tensor as a message buffer: itself, if it is one or if none is needed, else a copy."""

    def exchange(self, send: Tensor, receive: Tensor, route: Route) -> Pending:
        """Move the messages of `send`, which came from `buffer` or `message`, to all ranks, and theirs to `receive`.

        Arguments:
            send, receive: flat, contiguous: a message for (or from) each rank, end to end in the order of ranks.
            route: sizes in elements.
        """

    def close(self) -> None:
        """Let go of the group and of all buffers. Whatever is asked for afterwards is a ValueError."""


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
