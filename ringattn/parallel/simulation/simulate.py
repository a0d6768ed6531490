"""Playing the plans of all ranks through, in the executor's order: who computes and who waits when. Pure.

What `plan_cost.py` prices rank by rank, as if nobody waited for another, is one system here. A rank has a queue of
kernels, and ports to the GPUs of its node and to the network, each in and out; a message holds its sender's and its
receiver's.
Transfers of one process group follow one another, as its stream does, and begin when both ends have posted them; short
ones that kernels pull are posted when they are waited for.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.plan.plan import AttentionPlan
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.pricing.exchange_times import exchange_times
from ringattn.parallel.pricing.pass_times import pulls
from ringattn.parallel.pricing.plan_cost import stage_costs
from ringattn.parallel.pricing.timeline import StageCost
from ringattn.parallel.simulation.event_queue import Work
from ringattn.parallel.simulation.traffic import Traffic


@dataclass(frozen=True)
class Scenario:
    """What is slower than the machine says.

    Arguments:
        ranks: factor on the compute of a sequence rank.
        links: factor on what passes a port: (sequence rank, "node" or "network") -> factor, both directions.
    """

    ranks: Mapping[int, float] = field(default_factory=dict)
    links: Mapping[tuple[int, str], float] = field(default_factory=dict)


@dataclass(frozen=True)
class Span:
    """What a rank does from `begin` to `end`, seconds: "compute", "cast", "reduce" or "exchange", of which stage and
    chunk of heads."""

    rank: int
    kind: str
    stage: int
    begin: float
    end: float
    chunk: int = 0


@dataclass(frozen=True)
class Pass:
    """One pass of all ranks."""

    ranks: int
    spans: tuple[Span, ...]

    @property
    def seconds(self) -> float:
        """Until the last rank is done."""
        return max((span.end for span in self.spans), default=0.0)

    def busy(self, kind: str) -> list[float]:
        """Seconds that each rank spends on one kind."""
        return [sum(span.end - span.begin for span in spans if span.kind == kind) for spans in self.by_rank]

    @property
    def ends(self) -> list[float]:
        """When each rank is done."""
        return [max((span.end for span in spans), default=0.0) for spans in self.by_rank]

    @cached_property
    def by_rank(self) -> list[list[Span]]:
        """The spans of each rank, by their beginning."""
        out: list[list[Span]] = [[] for _ in range(self.ranks)]
        for span in self.spans:
            out[span.rank].append(span)
        return out


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
    walked = [plan.backward if backward and plan.backward is not None else plan for plan in plans]
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
        self.batches: dict[tuple[str, int, int], _Batch] = {}  # kind, stage, rank
        self.computing: list[tuple[int, int, int]] = []  # rank, stage, task
        # What kernels of a rank lose if they run beside a whole batch, by what it sends and by what it receives.
        self.lost: dict[tuple[str, int, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._costs: dict[tuple[int, Shape], list[StageCost]] = {}

    def run(self) -> Pass:
        for rank in range(len(self.plans)):
            self._enqueue(_Queue(self, rank))
        for (kind, stage, rank), batch in self.batches.items():
            for peer, size in self.traffic.sent(kind, stage, rank):
                self._message(kind, rank, peer, size, (batch, self.batches[kind, stage, peer]))
                if kind != "exchange":  # nothing is computed beside an exchange
                    link = self.machine.links[self.machine.link_class(rank, peer), "p2p"]
                    self.lost[kind, stage, rank][0] += size * link.disturbance
                    self.lost[kind, stage, peer][1] += size * link.disturbance
        done = self._played()
        if self._disturb(done):
            done = self._played()
        return done

    def _played(self) -> Pass:
        begin, end = self.work.run()
        spans = [self._span("compute", stage, rank, begin[task], end[task]) for rank, stage, task in self.computing]
        spans += [
            self._span(kind, stage, rank, begin[batch.first], end[batch.last])
            for (kind, stage, rank), batch in self.batches.items()
        ]
        return Pass(len(self.plans), tuple(sorted(spans, key=lambda span: (span.rank, span.begin, span.stage))))

    def _span(self, kind: str, number: int, rank: int, begin: float, end: float) -> Span:
        chunk, stage = (0, number) if kind == "exchange" else divmod(number, len(self.plans[rank].stages))
        return Span(rank, kind, stage, begin, end, chunk)

    def _number(self, span: Span) -> int:
        """Of its stage, as in `traffic.py`."""
        return span.chunk * len(self.plans[span.rank].stages) + span.stage

    def _disturb(self, done: Pass) -> bool:
        """Lengthens kernels by what they lose to the transfers beside them in `done`, spread over each batch's time.

        Once: that the longer kernels move later transfers a little is left out.
        """
        tasks = {(rank, stage): task for rank, stage, task in self.computing}
        lost: dict[int, float] = defaultdict(float)
        for spans in done.by_rank:
            kernels = [span for span in spans if span.kind == "compute"]
            ends = [kernel.end for kernel in kernels]
            for batch in spans:
                seconds = max(self.lost.get((batch.kind, self._number(batch), batch.rank), (0.0,)))
                for kernel in kernels[bisect_right(ends, batch.begin) :] if seconds else ():
                    if kernel.begin >= batch.end:
                        break
                    beside = min(batch.end, kernel.end) - max(batch.begin, kernel.begin)
                    lost[tasks[kernel.rank, self._number(kernel)]] += seconds * beside / (batch.end - batch.begin)
        for task, seconds in lost.items():
            self.work.seconds[task] += seconds
        return bool(lost)

    def _enqueue(self, queue: "_Queue") -> None:
        plan, costs = self.plans[queue.rank], self._stage_costs(queue.rank)
        ring_rank = queue.rank // self.traffic.ulysses
        exchanged = exchange_times(self.machine, plan.exchange, ring_rank, self.shape, self.backward, plan.wide_reduce)
        seconds = [cost.compute for cost in costs]
        seconds[0] += exchanged.copies / plan.head_chunks  # of the exchange, which are before and after all stages
        queue.wait(queue.post("exchange", 0))
        if self.backward:
            _backward(queue, seconds, plan.head_chunks, fetch=not plan.keep_keys)
        else:
            _forward(queue, seconds, plan.head_chunks)
        queue.wait(queue.post("exchange", 1))

    def pulled(self, kind: str, stage: int, rank: int) -> bool:
        """Whether kernels pull a rank's transfers on the ring axis: those of all ranks, or none."""
        if kind == "exchange":
            return False
        plan = self.plans[rank]
        own, walked = plan.own(self.shape), plan.stages[stage % len(plan.stages)]
        if kind == "cast":
            return bool(pulls(self.machine, walked.cast.most * own.key_row_bytes))
        row_bytes = own.wide_key_row_bytes if plan.wide_reduce else own.key_row_bytes
        return bool(pulls(self.machine, walked.back.most * row_bytes))

    def _stage_costs(self, rank: int) -> list[StageCost]:
        """Ranks of one ring position that have as many heads share them."""
        plan = self.plans[rank]
        key = id(plan.stages), self.shape.share(plan.exchange)
        if key not in self._costs:
            self._costs[key] = stage_costs(self.machine, plan, self.shape, self.backward)
        return self._costs[key]

    def latency(self, kind: str, stage: int, rank: int, peers: Sequence[int]) -> float:
        """Seconds of a batch beside its bytes."""
        links = self.machine.links
        far = {self.machine.link_class(rank, peer) for peer in peers}
        primitive = "all_to_all" if kind == "exchange" else "p2p"
        collectives = self.traffic.collectives(stage, rank) if kind == "exchange" else 1
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

    kind: str
    stage: int
    last: int | None = -1


class _Queue:
    """What one rank's host enqueues. Kernels follow one another, and so do the transfers of each process group."""

    def __init__(self, program: _Program, rank: int) -> None:
        self.program, self.rank = program, rank
        self._after: list[int] = []  # what the next kernel waits for
        self._streams: dict[bool, int] = {}  # last batch of the ulysses group and of the ring group

    def compute(self, stage: int, seconds: float) -> None:
        seconds *= self.program.scenario.ranks.get(self.rank, 1.0)
        task = self.program.work.add(seconds, self._after)
        self.program.computing.append((self.rank, stage, task))
        self._after = [task]

    def post(self, kind: str, stage: int) -> "_Posted":
        """Transfers that begin when the kernels so far are done; those that kernels pull, when they are waited for."""
        if self.program.pulled(kind, stage, self.rank):
            return _Posted(kind, stage)
        return _Posted(kind, stage, self._begin(kind, stage))

    def _begin(self, kind: str, stage: int) -> int | None:
        """Transfers from now on: their last moment, or None if there are none."""
        program = self.program
        peers = program.traffic.peers(kind, stage, self.rank)
        if not peers:
            return None
        stream = kind == "exchange"
        before = [self._streams[stream]] if stream in self._streams else []
        first = program.work.add(0.0, [*self._after, *before])
        last = program.work.add(program.latency(kind, stage, self.rank, peers), [first])
        program.batches[kind, stage, self.rank] = _Batch(first, last)
        self._streams[stream] = last
        return last

    def wait(self, posted: "_Posted | None") -> None:
        if posted is None:
            return
        last = self._begin(posted.kind, posted.stage) if posted.last == -1 else posted.last
        if last is not None:
            self._after.append(last)


class _Casts:
    """Casts of the later stages, for one chunk of heads after another; nothing if keys are not cast."""

    def __init__(self, queue: _Queue, stages: int, chunks: int) -> None:
        self._queue = queue
        self._numbers = (number for number in range(stages * chunks) if number % stages)
        self._next = self._post()

    def _post(self) -> "_Posted | None":
        number = next(self._numbers, None)
        return None if number is None else self._queue.post("cast", number)

    def wait(self) -> None:
        """For one, and post the next."""
        self._queue.wait(self._next)
        self._next = self._post()


def _forward(queue: _Queue, seconds: Sequence[float], chunks: int) -> None:
    """The executor's forward pass: while a stage is computed the next is on its way."""
    stages = len(seconds)
    casts = _Casts(queue, stages, chunks)
    for number in range(stages * chunks):
        if number % stages:
            casts.wait()
        queue.compute(number, seconds[number % stages])


def _backward(queue: _Queue, seconds: Sequence[float], chunks: int, fetch: bool) -> None:
    """The executor's backward pass: the local stage comes last and hides the last reduce."""
    stages = len(seconds)
    casts = _Casts(queue, stages, chunks if fetch else 0)
    for first in range(0, stages * chunks, stages):
        reduce = None
        for stage in range(1, stages):
            casts.wait()
            queue.compute(first + stage, seconds[stage])
            queue.wait(reduce)
            reduce = queue.post("reduce", first + stage)
        queue.compute(first, seconds[0])
        queue.wait(reduce)
