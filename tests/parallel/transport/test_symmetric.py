"""The transport of copy engines and pulls: on no machine is a message read before it is written, or written over before
it was read, in steps that follow one another and in replays of captured ones."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ringattn.parallel.transport.peer_memory as peer_memory
import ringattn.parallel.transport.symmetric as symmetric
from ringattn.parallel.plan.route import Route
from ringattn.parallel.transport.symmetric import SymmetricTransport
from tests.parallel.transport.device_streams import Device, Node, ancestors, as_cuda

HALF = 1 << 12
SMALL, LARGE = 1, 32  # numbers a message has for each rank: pulled and copied


@dataclass(frozen=True)
class Exchange:
    """`late`: it is waited for only after the next one was sent."""

    size: int
    late: bool


Step = tuple[Exchange, ...]


@dataclass(frozen=True)
class Captured:
    step: Step


@dataclass(frozen=True)
class Replay:
    which: int  # of those captured, from the last one


class Rank:
    """One rank's host: what its device writes, reads, and where it meets the others, in the order in which it runs."""

    def __init__(self, rank: int, ranks: int, pulled: int, captures: bool = True) -> None:
        self.device, self.rank, self.ranks = Device(rank), rank, ranks
        self.writes: list[tuple[int, Node]] = []  # half, node
        self.reads: list[tuple[int, Node]] = []
        self.barriers: list[Node] = []
        self.graphs: list[Any] = []
        self.captures = captures
        own = torch.zeros(2 * HALF, dtype=torch.uint8)
        addresses = [peer << 32 for peer in range(ranks)]
        self.memory = mock.Mock(half=HALF, own=own, addresses=addresses, barrier=self.barrier)
        with self.patched():
            self.transport = SymmetricTransport(None, self.memory)  # type: ignore[arg-type]
        self.transport.pulled = pulled

    @contextmanager
    def patched(self) -> Iterator[None]:
        with (
            as_cuda(self.device, self.captures),
            mock.patch.multiple(
                symmetric,
                dist=mock.Mock(get_rank=lambda _: self.rank, get_world_size=lambda _: self.ranks),
                memcpy=lambda: self.copy,
                _puller=lambda: self.pull,
            ),
            mock.patch.object(peer_memory, "dist", mock.Mock(get_rank=lambda _: self.rank)),
        ):
            yield

    # What the transport asks of the memory's handle, the driver and the kernel.
    def barrier(self) -> None:
        self.device.enqueue(self.barriers.append)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        peer, half = source >> 32, (source & 0xFFFFFFFF) // HALF
        if peer == (self.rank + 1) % self.ranks or self.ranks == 1:  # one stands for all of a message
            self.device.enqueue(lambda node: self.reads.append((half, node)), self.device.streams[stream])

    def pull(self, addresses: Any, table: Any, target: Any, start: int, rank: int, longest: int) -> None:
        half = start * symmetric.UNIT // HALF
        self.device.enqueue(lambda node: self.reads.append((half, node)))

    def step(self, step: Step) -> None:
        pending: list[Any] = []
        for exchange in step:
            size = exchange.size * symmetric.UNIT
            sizes = (size,) * self.ranks
            route = Route(sizes, sizes, (self.rank * size,) * self.ranks, size * self.ranks)
            send = self.transport.buffer(route, torch.empty(0, dtype=torch.uint8))
            half = (send.data_ptr() - self.memory.own.data_ptr()) // HALF
            self.device.enqueue(lambda node, half=half: self.writes.append((half, node)))
            receive = torch.empty(route.received, dtype=torch.uint8)
            pending.append(self.transport.exchange(send, receive, route))
            kept = pending[-1:] if exchange.late else []
            for one in pending[: len(pending) - len(kept)]:
                one.wait()
            pending = kept
        for one in pending:
            one.wait()

    def run(self, program: list[Step | Captured | Replay]) -> None:
        with self.patched():
            for part in program:
                if isinstance(part, Captured):
                    with self.device.capturing(self.device.new_stream()) as graph:
                        self.step(part.step)
                    self.graphs.append(graph)
                elif isinstance(part, Replay):
                    if self.graphs:
                        self.device.replay(self.graphs[-1 - part.which % len(self.graphs)])
                else:
                    self.step(part)


def met(ranks: list[Rank]) -> None:
    """Make every barrier wait for what comes before it on all ranks."""
    assert len({len(rank.barriers) for rank in ranks}) == 1
    for meeting in zip(*(rank.barriers for rank in ranks), strict=True):
        arrivals = [Node(list(node.after)) for node in meeting]
        for node in meeting:
            node.after.extend(arrivals)


def check(ranks: list[Rank]) -> None:
    """No rank waits for ever; what is read was written, and is not written over before; a rank's barriers come one
    after another."""
    met(ranks)
    every = [node for rank in ranks for node in rank.device.ran]
    assert not any(node in ancestors(list(node.after)) for node in every), "ranks wait for one another"
    for rank in ranks:
        assert [half for half, _ in rank.writes] == [half for half, _ in rank.reads]
        for before, after in pairwise(rank.barriers):
            assert before in ancestors([after])
    for owner in ranks:
        for number, (half, write) in enumerate(owner.writes):
            later = [node for other, node in owner.writes[number + 1 :] if other == half]
            for reader in ranks:
                read = reader.reads[number][1]
                assert write in ancestors([read]), "read before it was written"
                if later:
                    assert read in ancestors([later[0]]), "written over before it was read"


def run(program: list[Step | Captured | Replay], ranks: list[Rank]) -> None:
    for rank in ranks:
        rank.run(program)
    check(ranks)


EXCHANGES = st.builds(Exchange, st.sampled_from([SMALL, LARGE]), st.booleans())
STEPS = st.lists(EXCHANGES, min_size=1, max_size=4).map(tuple)
PARTS = st.one_of(STEPS, st.builds(Captured, STEPS), st.builds(Replay, st.integers(0, 2)))


@given(program=st.lists(PARTS, min_size=1, max_size=7), ranks=st.integers(2, 3), same=st.booleans())
def test_no_message_is_lost(program: list[Step | Captured | Replay], ranks: int, same: bool) -> None:
    """Ranks may also differ in what they pull."""
    everyone = [Rank(rank, ranks, 8 * ranks * symmetric.UNIT if same or rank else -1) for rank in range(ranks)]
    run(program, everyone)


LATE = (Exchange(LARGE, True),) * 4


@pytest.mark.parametrize("program", [[LATE], [Captured(LATE), Replay(0), Replay(0)]])
def test_a_missing_wait_is_noticed(program: list[Step | Captured | Replay]) -> None:
    everyone = [Rank(rank, 2, -1) for rank in range(2)]
    with mock.patch.object(SymmetricTransport, "_wait_until_free"), pytest.raises(AssertionError, match="written over"):
        run(program, everyone)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_capture_without_its_barrier_is_noticed(size: int) -> None:
    odd = (Exchange(size, False),) * 3
    everyone = [Rank(rank, 2, 16 * symmetric.UNIT, captures=False) for rank in range(2)]
    with pytest.raises(AssertionError, match=r"written over|waits for what is not in it|waited for outside"):
        run([odd, Captured(odd), Replay(0), Replay(0), odd], everyone)


def route_of(sent: int) -> Route:
    """Of one of two ranks that sends so many numbers to each, while others may send more."""
    return Route((sent,) * 2, (sent,) * 2, (0, 0), 32)


@pytest.mark.parametrize("sent", [0, 16])
def test_a_given_buffer_is_the_message(sent: int) -> None:
    """Also an empty one, of a rank without heads or rows."""
    rank, route = Rank(0, 2, 0), route_of(sent)
    with rank.patched():
        given = rank.transport.buffer(route, torch.empty(0))
        assert rank.transport.message(given.view(-1), route).data_ptr() == given.data_ptr()
        rank.transport.exchange(given, torch.empty(route.received), route).wait()


@pytest.fixture
def growing() -> Iterator[Rank]:
    """A rank alone, which makes and maps its buffers itself."""
    handle = mock.Mock(buffer_ptrs=[0], barrier=lambda channel: None)
    memory = mock.Mock(
        empty=lambda size, dtype, device: torch.empty(size, dtype=dtype), rendezvous=lambda memory, group: handle
    )
    rank = Rank(0, 1, 1 << 30)
    rank.transport._memory = None
    cuda = {"synchronize": lambda: None, "current_device": lambda: 0}
    with (
        rank.patched(),
        mock.patch.multiple(symmetric.torch.cuda, **cuda),
        mock.patch.dict("sys.modules", {"torch.distributed._symmetric_memory": memory}),
        mock.patch.object(symmetric.torch.distributed, "_symmetric_memory", memory, create=True),
    ):
        yield rank


def test_what_graphs_read_is_kept(growing: Rank) -> None:
    """The message buffers, and the table of their addresses that pulls are given."""
    transport = growing.transport
    transport._large_enough(1)
    with growing.device.capturing(growing.device.new_stream()):
        growing.step((Exchange(SMALL, False),))
    assert transport._memory is not None
    kept = [weakref.ref(x) for x in (transport._memory.own, transport._memory.table)]
    transport._large_enough(transport._memory.half + 1)
    gc.collect()
    assert all(one() is not None for one in kept)


@pytest.mark.parametrize("sizes", [(SMALL, SMALL), (SMALL, LARGE), (LARGE, SMALL), (LARGE, LARGE)])
@pytest.mark.parametrize("before", [[], [Captured((Exchange(SMALL, False),))]])
def test_steps_may_be_on_several_streams(before: list[Step | Captured | Replay], sizes: tuple[int, int]) -> None:
    """Of which none waits for another, also after something was captured."""
    everyone = [Rank(rank, 2, 16 * symmetric.UNIT) for rank in range(2)]
    for rank in everyone:
        rank.run(before)
        for size in (*sizes, *sizes):
            with rank.patched():
                rank.device.stream = rank.device.new_stream()
            rank.run([(Exchange(size, False),)])
    check(everyone)
