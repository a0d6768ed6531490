"""The plan of one attention: who computes what and who sends what, as frozen data that can be read and printed.

Rows are local: of this rank's query and key tensors after the exchange (if there is one), or of a stage's key buffer.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property

from ringattn.kernels.spec import Call, Range
from ringattn.parallel.geometry.ranges import gaps, length, union
from ringattn.parallel.plan.exchange import Exchange
from ringattn.parallel.plan.route import Message, Route
from ringattn.parallel.plan.shape import Shape


@dataclass(frozen=True)
class Stage:
    """Transfers that must have arrived, then calls.

    Stage 0 reads the local keys and needs no transfer. A later stage reads a buffer of `rows` key rows filled by
    `copies` (local rows → buffer rows), `receives` and `repeats` (rows received → buffer rows where they stand once
    more); its `sends` are what this rank gives others for the same stage.
    Messages are in the order of ranks, one each; `cast` is the all-to-all of all ranks' messages, and `back` the one
    that returns the gradients of their rows. `index` are the global indices of the buffer's rows, as ranges in order.
    """

    calls: tuple[Call, ...]
    rows: int = 0
    index: tuple[Range, ...] = ()
    copies: tuple[tuple[Range, Range], ...] = ()
    repeats: tuple[tuple[Range, Range], ...] = ()
    sends: tuple[Message, ...] = ()
    receives: tuple[Message, ...] = ()
    cast: Route = Route()
    back: Route = Route()

    @cached_property
    def overlapping_keys(self) -> bool:
        """Whether a key row is read by more than one call, so that its gradient is a sum."""
        spans = sorted(block.k for call in self.calls for block in call.blocks if block.k[0] < block.k[1])
        return any(after[0] < before[1] for before, after in itertools.pairwise(spans))

    @cached_property
    def repeated_keys(self) -> bool:
        """Whether a token stands in the buffer more than once, so that its gradient is a sum."""
        copied = [rows for rows, _ in self.copies]
        return bool(self.repeats) or length(union(copied)) < length(copied)

    @cached_property
    def single_parts(self) -> bool:
        """Whether a key row that a call spans is in one block, so that the call writes all of its gradient."""
        return not self.overlapping_keys and all(call.dense_keys for call in self.calls)

    @cached_property
    def unread(self) -> tuple[Range, ...]:
        """Buffer rows that no call reads: they have no gradient."""
        return gaps([block.k for call in self.calls for block in call.blocks], self.rows)


@dataclass(frozen=True)
class AttentionPlan:
    """What this rank does for one attention, forward and backward.

    Arguments:
        schedule: "local", "gather", "joint" or "ring": how keys move on the ring axis.
        rows: query and key rows of this rank's ring position.
        index: their global indices, as ranges in the order of the rows.
        stages: stage 0, then those that need transfers.
        shared_q: the rows of `[start, stop)` may be in several calls, and are accumulated in float32.
        shared_k: local key rows whose gradient may have several parts, accumulated likewise.
        exchange: the heads' all-to-all around the stages, if the ulysses degree is above 1.
        head_chunks: the stages are walked through for one of so many equal chunks of heads after another, so that
            buffers and sums are those of one chunk.
        keep_keys: keep the cast keys for the backward pass instead of casting them again.
        wide_reduce: return the gradients of cast keys in float32; else in the dtype of the keys, half the bytes.
        engines: the axes, "ring" or "ulysses", whose messages copy engines read out of buffers of their own.
        backward: another plan of the same rows that the backward pass follows, if that is faster than this one.
        reason: why this schedule.
    """

    schedule: str
    ring: int
    ring_rank: int
    rows: int
    index: tuple[Range, ...]
    stages: tuple[Stage, ...]
    shared_q: Range
    shared_k: Range
    exchange: Exchange | None = None
    head_chunks: int = 1
    keep_keys: bool = False
    wide_reduce: bool = True
    engines: tuple[str, ...] = ()
    backward: "AttentionPlan | None" = None
    reason: str = ""

    @property
    def passes(self) -> "tuple[AttentionPlan, AttentionPlan]":
        """The plans that the forward and the backward pass walk through."""
        return self, self.backward or self

    def for_pass(self, backward: bool) -> "AttentionPlan":
        """The plan that one of the two passes walks through."""
        return self.passes[backward]

    @property
    def schedule_name(self) -> str:
        """The schedule in words: a ring with its stages."""
        return f"ring of {len(self.stages)} stages" if self.schedule == "ring" else self.schedule

    @cached_property
    def uncovered(self) -> tuple[Range, ...]:
        """Query rows of no call (padding): their output is 0."""
        return gaps([call.q for stage in self.stages for call in stage.calls], self.rows)

    @cached_property
    def unread(self) -> tuple[Range, ...]:
        """Local key rows that no local call reads."""
        return gaps(self._read, self.rows)

    @cached_property
    def without_grads(self) -> tuple[Range, ...]:
        """Local key rows that nobody reads."""
        return gaps([*self._read, *self._returned], self.rows)

    @cached_property
    def single_parts(self) -> bool:
        """Whether the gradient of a local key row is either written by a local call or comes back from one later stage:
        so it needs no sum beside the one that adds up what came back."""
        if len(self.stages) > 2 or not self.stages[0].single_parts:
            return False
        read, returned = union(self._read), union(self._returned)
        return length(union(read + returned)) == length(read) + length(returned)

    @property
    def _read(self) -> list[Range]:
        """Local key rows that local calls read."""
        return [block.k for call in self.stages[0].calls for block in call.blocks]

    @property
    def _returned(self) -> list[Range]:
        """Local key rows whose gradients come back from later stages."""
        copied = [rows for stage in self.stages for rows, _ in stage.copies]
        return copied + [rows for stage in self.stages for message in stage.sends for rows in message.ranges]

    @cached_property
    def once(self) -> bool:
        """Whether every query row is in one call, so that results need no place before they are there."""
        spans = sorted(call.q for stage in self.stages for call in stage.calls)
        bounds = [bound for span in spans for bound in span]
        return bool(spans) and bounds[0] == 0 and bounds[-1] == self.rows and bounds[1:-1:2] == bounds[2:-1:2]

    def own(self, shape: Shape) -> Shape:
        """The heads that this rank computes at a time, of an attention with the heads of `shape`."""
        return shape.share(self.exchange).chunk(self.head_chunks)

    @property
    def adds_grads(self) -> bool:
        """Whether gradients have several parts somewhere, to be added up."""
        return (
            self.shared_q != (0, 0)
            or self.shared_k != (0, 0)
            or len(self.stages) > 1
            or self.sums_copies
            or self.sums_groups
        )

    @property
    def sums_copies(self) -> bool:
        """Whether gradients of a key head's copies are added, in float32, after they were exchanged."""
        return self.exchange is not None and self.exchange.copied_keys and self.wide_reduce

    @property
    def sums_groups(self) -> bool:
        """Whether gradients of a key head are added over groups of heads."""
        return self.exchange is not None and self.exchange.groups > 1 and self.exchange.split_keys

    @property
    def received_rows(self) -> int:
        """Key rows, over all stages."""
        return sum(message.rows for stage in self.stages for message in stage.receives)

    @property
    def sent_rows(self) -> int:
        return sum(message.rows for stage in self.stages for message in stage.sends)

    def __str__(self) -> str:
        lines = [
            f"{self.schedule} on ring position {self.ring_rank} of {self.ring}: {self.rows} rows, receives "
            f"{self.received_rows} and sends {self.sent_rows} key rows"
        ]
        if self.reason:
            lines.append(f"  because {self.reason}")
        if self.head_chunks > 1:
            lines.append(f"  for one of {self.head_chunks} chunks of heads after another")
        if self.exchange is not None:
            share = self.exchange.heads[self.exchange.rank]
            lines.append(
                f"  exchange: {self.exchange.own_rows} of {self.exchange.position_rows} rows against query heads "
                f"{share.query[0]}-{share.query[1] - 1}, key heads {','.join(map(str, share.keys))}"
            )
        for number, stage in enumerate(self.stages):
            lines += _describe(number, stage)
        if self.backward is not None:
            lines += ["  backward:", *(f"  {line}" for line in str(self.backward).splitlines())]
        return "\n".join(lines)


@dataclass(frozen=True)
class PartedPlan:
    """The plans of this rank for the parts of a layout: each with the rows of the rank's tensors that are its own."""

    parts: tuple[tuple[Range, AttentionPlan], ...]

    def __str__(self) -> str:
        if len(self.parts) == 1:
            return str(self.parts[0][1])
        return "\n".join(f"rows {start}-{stop}: {plan}" for (start, stop), plan in self.parts)


def _describe(number: int, stage: Stage) -> list[str]:
    wire = ", ".join(f"{message.rows} from {message.peer}" for message in stage.receives)
    lines = [
        f"  stage {number}: " + (f"{stage.rows} key rows ({wire or 'nothing received'})" if number else "local keys")
    ]
    kinds = {(-1, -1): "full", (-1, 0): "causal"}
    for call in stage.calls:
        kind = kinds.get((call.left, call.right), f"window {call.left},{call.right}")
        lines.append(
            f"    {kind}: rows {call.q[0]}-{call.q[1]} over keys {call.k[0]}-{call.k[1]}, {len(call.blocks)} blocks"
        )
    return lines
