"""Moving messages between the ranks of one mesh axis: fill a buffer, exchange, wait once.

There is one primitive, the uneven all-to-all: casts and reduces of keys and the exchange of heads are all messages laid
end to end, one for each rank. What is in them is the plan's business; a transport only moves what it is given.
"""

from typing import Protocol

from torch import Tensor

from ringattn.parallel.plan.route import Route


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
