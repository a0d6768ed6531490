"""Playing the plans of all ranks through, in the executor's order: who computes and who waits when. Pure.

What `pricing/` prices rank by rank, as if nobody waited for another, is one system here. A rank has a queue of kernels,
and ports to the GPUs of its node and to the network, each in and out; a message holds its sender's and its receiver's.
Transfers of one process group follow one another, as its stream does, and begin when both ends have posted them; short
ones that kernels pull are posted when they are waited for.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.plan.plan import AttentionPlan
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.pricing.exchange_times import exchange_times
from ringattn.parallel.pricing.pass_times import pulls
from ringattn.parallel.pricing.plan_cost import stage_costs
from ringattn.parallel.pricing.timeline import StageCost
from ringattn.parallel.simulation.event_queue import Work
from ringattn.parallel.simulation.spans import Pass, Span
from ringattn.parallel.simulation.traffic import BatchKey, Traffic


@dataclass(frozen=True)
class Scenario:
    """What is slower than the machine says.

    Arguments:
        ranks: factor on the compute of a sequence rank.
        links: factor on what passes a port: (sequence rank, "node" or "network") -> factor, both directions.
    """

    ranks: Mapping[int, float] = field(default_factory=dict)
    links: Mapping[tuple[int, str], float] = field(default_factory=dict)


def simulate(
    machine: Machine,
    plans: Sequence[AttentionPlan],
    shape: Shape,
    backward: bool,
    scenario: Scenario | None = None,
) -> Pass:
    """One pass of one attention over all ranks.

    Arguments:
        plans: of every sequence rank, in their order; the group starts at the first GPU of a node.
        shape: the model's.
    """
    walked = [plan.for_pass(backward) for plan in plans]
    return _Program(machine, walked, shape, backward, scenario or Scenario()).run()


@dataclass(frozen=True)
class _Batch:
    """The transfers of one rank that are posted together: their first and their last moment, as tasks."""

    first: int
    last: int


class _Program:
    """The tasks of one pass of all ranks."""

    def __init__(
        self,
        machine: Machine,
        plans: Sequence[AttentionPlan],
        shape: Shape,
        backward: bool,
        scenario: Scenario,
    ) -> None:
        self.machine, self.shape, self.scenario = machine, shape, scenario
        self.traffic = Traffic(plans, shape, backward)
        self.plans, self.backward = plans, backward
        self.work = Work()
        self.batches: dict[tuple[BatchKey, int], _Batch] = {}  # by rank
        self.computing: dict[tuple[int, int, int], int] = {}  # rank, stage and chunk of heads -> task
        # What kernels of a rank lose if they run beside a whole batch, by what it sends and by what it receives.
        self.lost: dict[tuple[BatchKey, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._costs: dict[tuple[int, Shape], list[StageCost]] = {}

    def run(self) -> Pass:
        for rank in range(len(self.plans)):
            self._enqueue(_Queue(self, rank))
        for (key, rank), batch in self.batches.items():
            for peer, size in self.traffic.sent(key, rank):
                self._message(key.kind, rank, peer, size, (batch, self.batches[key, peer]))
                if key.kind != "exchange":  # nothing is computed beside an exchange
                    link = self.machine.links[self.machine.link_class(rank, peer), "p2p"]
                    self.lost[key, rank][0] += size * link.disturbance
                    self.lost[key, peer][1] += size * link.disturbance
        done = self._played()
        if self._disturb(done):
            done = self._played()
        return done

    def _played(self) -> Pass:
        begin, end = self.work.run()
        spans = [
            Span(rank, "compute", stage, begin[task], end[task], chunk)
            for (rank, stage, chunk), task in self.computing.items()
        ]
        spans += [
            Span(rank, key.kind, key.stage, begin[batch.first], end[batch.last], key.chunk)
            for (key, rank), batch in self.batches.items()
        ]
        return Pass(len(self.plans), tuple(sorted(spans, key=lambda span: (span.rank, span.begin, span.stage))))

    def _disturb(self, done: Pass) -> bool:
        """Lengthens kernels by what they lose to the transfers beside them in `done`, spread over each batch's time.

        Once: that the longer kernels move later transfers a little is left out.
        """
        lost: dict[int, float] = defaultdict(float)
        for spans in done.by_rank:
            kernels = [span for span in spans if span.kind == "compute"]
            ends = [kernel.end for kernel in kernels]
            for batch in spans:
                key = BatchKey(batch.kind, batch.stage, batch.chunk)
                seconds = max(self.lost.get((key, batch.rank), (0.0,)))
                for kernel in kernels[bisect_right(ends, batch.begin) :] if seconds else ():
                    if kernel.begin >= batch.end:
                        break
                    beside = min(batch.end, kernel.end) - max(batch.begin, kernel.begin)
                    task = self.computing[kernel.rank, kernel.stage, kernel.chunk]
                    lost[task] += seconds * beside / (batch.end - batch.begin)
        for task, seconds in lost.items():
            self.work.seconds[task] += seconds
        return bool(lost)

    def _enqueue(self, queue: "_Queue") -> None:
        plan, costs = self.plans[queue.rank], self._stage_costs(queue.rank)
        ring_rank = queue.rank // self.traffic.ulysses
        exchanged = exchange_times(self.machine, plan.exchange, ring_rank, self.shape, self.backward, plan.wide_reduce)
        seconds = [cost.compute for cost in costs]
        seconds[0] += exchanged.copies / plan.head_chunks  # of the exchange, which are before and after all stages
        queue.wait(queue.post(BatchKey("exchange", 0)))
        if self.backward:
            _backward(queue, seconds, plan.head_chunks, fetch=not plan.keep_keys)
        else:
            _forward(queue, seconds, plan.head_chunks)
        queue.wait(queue.post(BatchKey("exchange", 1)))

    def pulled(self, key: BatchKey, rank: int) -> bool:
        """Whether kernels pull a rank's transfers on the ring axis: those of all ranks, or none."""
        if key.kind == "exchange":
            return False
        plan = self.plans[rank]
        own, stage = plan.own(self.shape), plan.stages[key.stage]
        if key.kind == "cast":
            return bool(pulls(self.machine, stage.cast.most * own.key_row_bytes))
        return bool(pulls(self.machine, stage.back.most * own.returned_row_bytes(plan.wide_reduce)))

    def _stage_costs(self, rank: int) -> list[StageCost]:
        """Ranks of one ring position that have as many heads share them."""
        plan = self.plans[rank]
        key = id(plan.stages), self.shape.share(plan.exchange)
        if key not in self._costs:
            self._costs[key] = stage_costs(self.machine, plan, self.shape, self.backward)
        return self._costs[key]

    def latency(self, key: BatchKey, rank: int, peers: Sequence[int]) -> float:
        """Seconds of a batch beside its bytes."""
        links = self.machine.links
        far = {self.machine.link_class(rank, peer) for peer in peers}
        primitive = "all_to_all" if key.kind == "exchange" else "p2p"
        collectives = self.traffic.collectives(key, rank)
        return collectives * max((links[link_class, primitive].latency for link_class in far), default=0.0)

    def _message(self, kind: str, rank: int, peer: int, size: float, ends: tuple[_Batch, _Batch]) -> None:
        link_class = self.machine.link_class(rank, peer)
        link = self.machine.links[link_class, "all_to_all" if kind == "exchange" else "p2p"]
        slow = self.scenario.links
        factor = max(slow.get((rank, link_class), 1.0), slow.get((peer, link_class), 1.0))
        task = self.work.add(
            factor * size / link.bandwidth, [batch.first for batch in ends], self._ports(rank, peer, link_class)
        )
        for batch in ends:
            self.work.link(task, batch.last)

    def _ports(self, rank: int, peer: int, link_class: str) -> tuple[int, int]:
        """What a message holds. Rail-aligned: it leaves its node through the port that has the receiver's rail."""
        per_node = self.machine.gpus_per_node
        if link_class == "network":
            return 4 * (rank // per_node * per_node + peer % per_node) + 2, 4 * peer + 3
        return 4 * rank, 4 * peer + 1


class _Posted(NamedTuple):
    """Transfers of a rank, and their last moment: -1 if they have not begun, None if there are none."""

    key: BatchKey
    last: int | None = -1


class _Queue:
    """What one rank's host enqueues. Kernels follow one another, and so do the transfers of each process group."""

    def __init__(self, program: _Program, rank: int) -> None:
        self.program, self.rank = program, rank
        self._after: list[int] = []  # what the next kernel waits for
        self._streams: dict[bool, int] = {}  # last batch of the ulysses group and of the ring group

    def compute(self, stage: int, chunk: int, seconds: float) -> None:
        seconds *= self.program.scenario.ranks.get(self.rank, 1.0)
        task = self.program.work.add(seconds, self._after)
        self.program.computing[self.rank, stage, chunk] = task
        self._after = [task]

    def post(self, key: BatchKey) -> "_Posted":
        """Transfers that begin when the kernels so far are done; those that kernels pull, when they are waited for."""
        return _Posted(key) if self.program.pulled(key, self.rank) else _Posted(key, self._begin(key))

    def _begin(self, key: BatchKey) -> int | None:
        """Transfers from now on: their last moment, or None if there are none."""
        program = self.program
        peers = program.traffic.peers(key, self.rank)
        if not peers:
            return None
        stream = key.kind == "exchange"
        before = [self._streams[stream]] if stream in self._streams else []
        first = program.work.add(0.0, [*self._after, *before])
        last = program.work.add(program.latency(key, self.rank, peers), [first])
        program.batches[key, self.rank] = _Batch(first, last)
        self._streams[stream] = last
        return last

    def wait(self, posted: "_Posted | None") -> None:
        if posted is None:
            return
        last = self._begin(posted.key) if posted.last == -1 else posted.last
        if last is not None:
            self._after.append(last)


def _casts(queue: _Queue, stages: int, chunks: int) -> Iterator[None]:
    """Casts of the later stages, for one chunk of heads after another. The first step posts one; each after it waits
    for the last that was posted, and posts the next."""
    for chunk in range(chunks):
        for stage in range(1, stages):
            posted = queue.post(BatchKey("cast", stage, chunk))
            yield
            queue.wait(posted)


def _forward(queue: _Queue, seconds: Sequence[float], chunks: int) -> None:
    """The executor's forward pass: while a stage is computed the next is on its way."""
    casts = _casts(queue, len(seconds), chunks)
    next(casts, None)
    for chunk in range(chunks):
        for stage, compute in enumerate(seconds):
            if stage:
                next(casts, None)
            queue.compute(stage, chunk, compute)


def _backward(queue: _Queue, seconds: Sequence[float], chunks: int, fetch: bool) -> None:
    """The executor's backward pass: the local stage comes last and hides the last reduce."""
    casts = _casts(queue, len(seconds), chunks if fetch else 0)
    next(casts, None)
    for chunk in range(chunks):
        reduce = None
        for stage in range(1, len(seconds)):
            next(casts, None)
            queue.compute(stage, chunk, seconds[stage])
            queue.wait(reduce)
            reduce = queue.post(BatchKey("reduce", stage, chunk))
        queue.compute(0, chunk, seconds[0])
        queue.wait(reduce)
