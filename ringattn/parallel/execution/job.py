"""One attention of this rank, settled: its plan, kernels and transports, and what its backward pass needs."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ringattn.kernels.spec import Backend, Options, Range
from ringattn.parallel.execution.head_exchange import HeadExchange
from ringattn.parallel.plan.plan import AttentionPlan
from ringattn.parallel.transport.protocol import Transport

T = TypeVar("T")


# A pass of a job: it stops before it would wait for a transfer, so that others can issue what they have meanwhile.
Steps = Generator[None, None, T]


@dataclass(frozen=True)
class Job:
    """All that an attention needs beside its tensors; where a layout has several parts there is a job for each."""

    plan: AttentionPlan
    rows: Range  # of the rank's tensors
    options: Options
    dropout: tuple[float, int] | None  # probability and seed
    backend: Backend
    adds: bool  # the backend adds gradients to sums by itself
    ring: Transport | None
    ulysses: Transport | None
    device: torch.device
    query_heads: int
    key_heads: int
    return_lse: bool = False
    group: int = 0  # of the heads of an exchange
    chunk: int = 0  # of the heads that are computed one after another

    @cached_property
    def exchange(self) -> HeadExchange | None:
        """The exchange of heads around the stages, if there is one."""
        if self.plan.exchange is None or self.ulysses is None:
            return None
        return HeadExchange(self.plan.exchange, self.ulysses)

    @property
    def heads(self) -> Range:
        """The query heads that are computed here, of the model's."""
        exchange = self.plan.exchange
        if exchange is None:
            return 0, self.query_heads
        first, last = exchange.share.group(self.group, exchange.groups)[0]
        return exchange.share.query[0] + first, exchange.share.query[0] + last

    @property
    def first_head(self) -> int:
        """The first query head that is computed in this chunk, of the model's."""
        first, last = self.heads
        return first + self.chunk * (last - first) // self.plan.head_chunks

    @cached_property
    def groups(self) -> "tuple[Job, ...]":
        """This job for each group of heads."""
        count = 1 if self.plan.exchange is None else self.plan.exchange.groups
        # Each would cast keys of its own, and there is one list of those that are kept for the backward pass.
        assert count == 1 or self.plan.ring == 1, "heads are exchanged in groups where no keys are cast"
        return tuple(replace(self, group=group) for group in range(count))

    @cached_property
    def chunks(self) -> "tuple[Job, ...]":
        """This job for each chunk of heads."""
        count = self.plan.head_chunks
        return (self,) if count == 1 else tuple(replace(self, chunk=chunk) for chunk in range(count))

    def of_chunk(self, x: Tensor, dim: int = 1) -> Tensor:
        """The heads of this chunk, of all along a dimension."""
        if self.plan.head_chunks == 1:
            return x
        size = x.shape[dim] // self.plan.head_chunks
        return x.narrow(dim, self.chunk * size, size)

    @cached_property
    def backward(self) -> "Job":
        """This job with the plan that the backward pass walks."""
        return self if self.plan.backward is None else replace(self, plan=self.plan.backward)


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass; after the exchange, if there is one."""

    q: Tensor  # (n, H, D)
    k: Tensor  # (n, K, D), or no rows where no call reads it
    v: Tensor  # (n, K, V), or no rows
    out: Tensor  # (n, H, V)
    lse: Tensor  # (H, n)

    @classmethod
    def of(cls, job: Job, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kept: Sequence[Tensor]) -> "Saved":
        """Without the keys of the position where all of them are in buffers that are kept as well."""
        if kept and not job.plan.stages[0].calls:
            k, v = (x.new_empty(0, *x.shape[1:]) for x in (k, v))
        return cls(q, k, v, out, lse)

    def new_key_grads(self) -> list[Tensor]:
        """Of k and of v, with nothing in them yet."""
        return [x.new_empty(len(self.q), *x.shape[1:]) for x in (self.k, self.v)]
