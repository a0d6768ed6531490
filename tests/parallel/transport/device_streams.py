"""Streams, events and captured graphs of several devices, of which only the order is real.

What a rank's host enqueues becomes nodes that wait for others, as CUDA promises it: streams are queues, an event is
the last node of a stream when it was recorded, a graph keeps the order among its nodes and runs as one in the stream
that replays it. A barrier waits for the same barrier of all ranks. Nodes that reach one another are ordered on every
machine.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import ringattn.parallel.transport.symmetric as symmetric


@dataclass(eq=False)
class Node:
    """One operation. `does`: what it is called with when it runs, once for every replay."""

    after: "list[Node]"
    does: Callable[["Node"], None] | None = None
    captured: bool = False


@dataclass(eq=False)
class Stream:
    device: "Device"
    number: int

    @property
    def cuda_stream(self) -> int:
        return self.number

    def wait_stream(self, other: "Stream") -> None:
        event = Event()
        event.record(other)
        event.wait(self)


class Event:
    """A node, and the capture that it belongs to."""

    def __init__(self) -> None:
        self.node: Node | None = None
        self.capture: Graph | None = None

    def record(self, stream: Stream | None = None) -> None:
        device = Device.current
        stream = stream or device.stream
        self.node, self.capture = device.last.get(stream.number), None
        if device.capture is not None and stream.number in device.capture.last:
            self.node, self.capture = device.capture.last[stream.number], device.capture

    def wait(self, stream: Stream | None = None) -> None:
        device = Device.current
        stream = stream or device.stream
        capturing = device.capture is not None and stream.number in device.capture.last
        if self.capture is not None:
            assert self.capture is device.capture, "an event of a capture is waited for outside of it"
            self.capture.last.setdefault(stream.number, None)  # the stream joins the capture
        else:
            assert not capturing or self.node is None, "a capture waits for what is not in it"
        if self.node is not None:
            device.enqueue(None, stream, [self.node])


@dataclass(eq=False)
class Graph:
    """Nodes in the order in which they were captured; `last` of each stream that takes part."""

    origin: int
    nodes: list[Node] = field(default_factory=list)
    last: dict[int, Node | None] = field(default_factory=dict)


class Device:
    """A rank's streams, and all that its device runs, in an order in which it may."""

    current: "Device"

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.streams = [Stream(self, 0)]
        self.stream = self.streams[0]
        self.last: dict[int, Node | None] = {}
        self.capture: Graph | None = None
        self.ran: list[Node] = []

    def new_stream(self, *_: Any, **__: Any) -> Stream:
        self.streams.append(Stream(self, len(self.streams)))
        return self.streams[-1]

    def enqueue(
        self, does: Callable[[Node], None] | None, stream: Stream | None = None, after: "list[Node] | None" = None
    ) -> None:
        number = (stream or self.stream).number
        graph = self.capture if self.capture is not None and number in self.capture.last else None
        last = self.last if graph is None else graph.last
        before = [*(after or []), *([last[number]] if last.get(number) else [])]
        node = Node([one for one in before if one is not None], does, graph is not None)
        last[number] = node
        if graph is None:
            self._run(node)
        else:
            graph.nodes.append(node)

    def _run(self, node: Node) -> None:
        self.ran.append(node)
        if node.does is not None:
            node.does(node)

    @contextmanager
    def capturing(self, stream: Stream) -> Iterator[Graph]:
        before, self.stream = self.stream, stream
        graph = Graph(stream.number, last={stream.number: None})
        self.capture = graph
        yield graph
        reached = ancestors([graph.last[stream.number]])
        assert all(last is None or last in reached for last in graph.last.values()), "a stream did not come back"
        self.capture, self.stream = None, before

    def replay(self, graph: Graph) -> None:
        start = self.last.get(self.stream.number)
        copies: dict[Node, Node] = {}
        for node in graph.nodes:
            after = [copies[one] for one in node.after] or ([start] if start else [])
            copies[node] = Node(after, node.does)
            self._run(copies[node])
        self.last[self.stream.number] = Node(list(copies.values()))
        self.ran.append(self.last[self.stream.number])  # type: ignore[arg-type]


def ancestors(nodes: "list[Node | None]") -> set[Node]:
    """These and all that run before them."""
    found: set[Node] = set()
    left = [node for node in nodes if node is not None]
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += node.after
    return found


@contextmanager
def as_cuda(device: Device, captures: bool = True) -> Iterator[None]:
    """What `symmetric` asks CUDA for is asked of a device, which may say nothing of captures."""
    Device.current = device
    cuda = {
        "Stream": device.new_stream,
        "current_stream": lambda *_: device.stream,
        "set_stream": lambda stream: setattr(device, "stream", stream),
        "is_current_stream_capturing": lambda: device.capture is not None,
        "ExternalStream": lambda number: device.streams[number],
    }
    with (
        mock.patch.multiple(symmetric.torch.cuda, **cuda),
        mock.patch.multiple(
            symmetric,
            Event=Event,
            raw_stream=lambda: device.stream.number,
            capture_number=lambda _: id(device.capture) if device.capture is not None and captures else 0,
        ),
    ):
        yield
