"""What the stages of a schedule compute and move: the one record that prices are made of. Pure.

It is made in two ways. `StageWork.of` reads a plan, and is exact for its rank. `AllPositions` counts all ring positions
at once from their key demand, without their plans: that is what choices are made by, since every rank makes them.

What is counted instead of read from plans is exact but for this:

- every rank has the largest share of the heads, its links are those of the first rank of its position, and an exchange
  takes at every position as long as at the first;
- a gather's calls are counted as if the order of rows parted none of them;
- in the later stages of a ring the work of a position is spread in proportion to the rows that arrive, in a call for
  each kind of piece (heads of documents, tails), or for each sender if they are fewer (`ring.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ringattn.parallel.geometry.block_table import BlockTable, Floats, Ints
from ringattn.parallel.machine.machine import CLASSES, Machine, calls_seconds
from ringattn.parallel.plan.exchange import Exchange
from ringattn.parallel.plan.plan import AttentionPlan
from ringattn.parallel.plan.route import Message
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.schedules.demand import KeyDemand, sum_by
from ringattn.parallel.schedules.segment_demand import SegmentDemand

Passes = tuple["StageWork", "StageWork"]  # forward and backward


@dataclass(frozen=True)
class Moved:
    """Key rows that each stage moves, the local one first. Both passes share it, and what is worked out of it.

    Arguments:
        received, sent: over each class of link, (classes, stages) of one rank, or (classes, stages, positions) of all.
        most_sent, most_returned: rows of the largest cast, and reduce, of any rank: (stages,) or (stages, 1).
        senders: from how many others they come, (stages,) or (stages, positions).
    """

    received: Ints
    sent: Ints
    most_sent: Ints
    most_returned: Ints
    senders: Ints

    @cached_property
    def received_rows(self) -> Ints:
        """Over all links."""
        return self.received.sum(0)

    @cached_property
    def sent_rows(self) -> Ints:
        return self.sent.sum(0)

    @cached_property
    def by_class(self) -> dict[str, Ints]:
        """Rows over each class of link: both directions at the same time, so the larger counts. Without the network if
        nothing travels over it, which is nothing to price either."""
        both = zip(CLASSES, np.maximum(self.received, self.sent), strict=True)
        return {name: rows for name, rows in both if name == "node" or rows.any()}


@dataclass(frozen=True)
class StageWork:
    """What each stage of one pass computes and moves, the local stage first, for one chunk of heads.

    Of one rank the fields are columns (stages,), of all ring positions (stages, positions); those without stages are
    numbers, or (positions,). A field that is nothing everywhere may be 0.

    Arguments:
        own: heads and dims of what is computed at a time.
        backward: which of the passes it is.
        kernels: seconds of the calls.
        calls: how many they are.
        merged: query rows that these calls add to what other calls have left.
        moved: key rows that travel.
        copied: key rows of the stage's buffer beside those that are received.
        messages: that are sent and received in all casts; those of the reduces are as many.
        shared_q, shared_k: query rows, and local rows of key gradients, that are added up in float32.
    """

    own: Shape
    backward: bool
    kernels: Any
    calls: Any
    merged: Any
    moved: Moved
    copied: Any
    messages: Any
    shared_q: Any
    shared_k: Any

    @classmethod
    def of(cls, plan: AttentionPlan, machine: Machine, own: Shape, backward: bool) -> "StageWork":
        """That of one rank, in the pass that walks `plan`."""
        stages, (first, last) = plan.stages, plan.shared_q
        tables = [BlockTable.of(stage.calls) for stage in stages]
        merged = [sum(max(0, min(call.q[1], last) - max(call.q[0], first)) for call in stage.calls) for stage in stages]
        moved = Moved(
            received=_by_class(machine, plan, [stage.receives for stage in stages]),
            sent=_by_class(machine, plan, [stage.sends for stage in stages]),
            most_sent=np.array([stage.cast.most for stage in stages]),
            most_returned=np.array([stage.back.most for stage in stages]),
            senders=np.array([len(stage.receives) for stage in stages]),
        )
        return cls(
            own=own,
            backward=backward,
            kernels=np.array([calls_seconds(machine, table, own, backward).sum() for table in tables]),
            calls=np.array([len(stage.calls) for stage in stages]),
            merged=np.array(merged),
            moved=moved,
            copied=np.array([stage.rows - stage.cast.received for stage in stages]),
            messages=sum(len(stage.sends) + len(stage.receives) for stage in stages),
            shared_q=last - first,
            shared_k=summed_keys(plan),
        )

    @classmethod
    def stacked(cls, works: Sequence["StageWork"]) -> "StageWork":
        """Those of all ring positions, of which each was read from a plan, as one."""
        moved = _stacked([work.moved for work in works])
        for name in ("most_sent", "most_returned"):
            moved[name] = moved[name][:, :1]  # all ranks know the same
        columns = _stacked(works, ("own", "backward", "moved"))
        return cls(own=works[0].own, backward=works[0].backward, moved=Moved(**moved), **columns)

    @property
    def buffers(self) -> Any:
        """Key rows of each stage's buffer."""
        return self.moved.received_rows + self.copied

    @property
    def later(self) -> int:
        """How many stages have a cast."""
        return len(self.moved.received_rows) - 1


def _stacked(records: Sequence[Any], without: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of records of one kind, with a last axis over the records."""
    names = [field.name for field in fields(records[0]) if field.name not in without]
    return {name: np.stack([getattr(record, name) for record in records], -1) for name in names}


def summed_keys(plan: AttentionPlan) -> int:
    """Local key rows whose gradients are added up in float32, by a backend that adds; of copies of a head they are all,
    and lie side by side in a message once more."""
    if plan.sums_copies or plan.sums_groups:
        return plan.rows * (2 if plan.sums_copies else 1)
    return 0 if plan.single_parts else plan.shared_k[1] - plan.shared_k[0]


def _by_class(machine: Machine, plan: AttentionPlan, messages: Sequence[Sequence[Message]]) -> Ints:
    """Rows of each stage's messages by the class of link that they take, (classes, stages)."""
    ulysses, rank = (1, 0) if plan.exchange is None else (len(plan.exchange.rows), plan.exchange.rank)
    rows = np.zeros((len(CLASSES), len(messages)), dtype=np.int64)
    for stage, batch in enumerate(messages):
        for message in batch:
            link_class = machine.link_class(plan.ring_rank * ulysses + rank, message.peer * ulysses + rank)
            rows[CLASSES.index(link_class), stage] += message.rows
    return rows


@dataclass(frozen=True)
class AllPositions:
    """All ring positions, to count what a schedule makes of them; what the schedules share is counted once.

    Arguments:
        own: what a rank computes at a time, of the largest share of the heads.
        exchange: of one rank, where heads are exchanged.
    """

    demand: KeyDemand | SegmentDemand
    machine: Machine
    own: Shape
    exchange: Exchange | None = None

    @property
    def counted(self) -> KeyDemand:
        """What schedules count on for plain documents; where documents have segments they are planned instead."""
        assert isinstance(self.demand, KeyDemand)
        return self.demand

    @cached_property
    def joint(self) -> "AllPositions":
        """The same where every piece waits for the keys from elsewhere."""
        return replace(self, demand=self.counted.joint)

    def call_seconds(self, table: BlockTable, ordinal: Ints, position: Ints) -> tuple[Floats, Floats]:
        """Seconds of kernels forward and backward, (ordinals, positions): each block of the table is in the call that
        has its ordinal at its position."""
        positions = self.demand.positions
        most = int(ordinal.max(initial=0)) + 1
        table = replace(table, call=ordinal * positions + position, calls=most * positions)
        forward, backward = (calls_seconds(self.machine, table, self.own, backward) for backward in (False, True))
        return forward.reshape(most, positions), backward.reshape(most, positions)

    def moved(self, distances: Sequence[range]) -> Moved:
        """What moves for a local stage, which needs nothing, and for later ones whose keys come from so far away on the
        ring."""
        positions = self.demand.positions
        stages = 1 + len(distances)
        stage_of = np.zeros(positions, dtype=np.int64)
        for stage, span in enumerate(distances, 1):
            stage_of[span.start : span.stop : span.step] = stage
        reader, holder, rows, distance, link_class = self._remote
        room = (link_class * stages + stage_of[distance]) * positions
        size, shape = len(CLASSES) * stages * positions, (len(CLASSES), stages, positions)
        received, sent = (sum_by(room + position, rows, size).reshape(shape) for position in (reader, holder))
        most_sent, most_returned = (rows.sum(0).max(1, keepdims=True) for rows in (sent, received))
        senders = np.bincount(stage_of[distance] * positions + reader, minlength=stages * positions)
        return Moved(received, sent, most_sent, most_returned, senders.reshape(stages, positions))

    def passes(
        self,
        moved: Moved,
        kernels: Sequence[Floats],
        calls: Any,
        *,
        merged: Any = 0,
        copied: Any = 0,
        shared_q: Any = 0,
        shared_k: Any = 0,
    ) -> Passes:
        """The work of both passes.

        Arguments:
            kernels: their seconds, forward and backward.
            calls, merged, copied, shared_q, shared_k: see `StageWork`.
        """
        forward = StageWork(
            own=self.own,
            backward=False,
            kernels=kernels[0],
            calls=calls,
            merged=merged,
            moved=moved,
            copied=copied,
            messages=self._messages,
            shared_q=shared_q,
            shared_k=shared_k,
        )
        return forward, replace(forward, backward=True, kernels=kernels[1])

    @cached_property
    def _remote(self) -> tuple[Ints, Ints, Ints, Ints, Ints]:
        """What travels: reader, holder, rows, distance on the ring, number of the class of link."""
        positions, ulysses = self.demand.positions, 1 if self.exchange is None else len(self.exchange.rows)
        nodes = np.arange(positions) * ulysses // self.machine.gpus_per_node
        reader, holder, rows = self.demand.traffic
        some = reader != holder
        reader, holder, rows = reader[some], holder[some], rows[some]
        link_class = (nodes[reader] != nodes[holder]).astype(np.int64)  # `CLASSES` begins with links inside a node
        return reader, holder, rows, (holder - reader) % positions, link_class

    @cached_property
    def _messages(self) -> npt.NDArray[np.int64]:
        """Messages that each position sends and receives."""
        reader, holder, *_ = self._remote
        return np.bincount(np.concatenate([reader, holder]), minlength=self.demand.positions)
