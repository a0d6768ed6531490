"""The Ulysses exchange (DeepSpeed-Ulysses, arXiv 2309.14509): from a run of tokens with all heads to all tokens of the
ring position with some heads, and back. Uneven in both directions where heads or tokens do not divide.

All tensors of a pass travel in one message: a row of it holds a token's heads of each, side by side.

Legend: t local tokens, n tokens of the ring position, H query heads, K key heads, h and c this rank's share of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from ringattn.kept import kept
from ringattn.kernels.movement.heads import head_columns, pack_heads, unpack_heads
from ringattn.kernels.movement.slots import Slot, Slots
from ringattn.parallel.plan.exchange import Exchange
from ringattn.parallel.plan.route import Route
from ringattn.parallel.transport.protocol import Pending, Transport
from ringattn.whereabouts import comes_to


@dataclass(frozen=True)
class Arriving:
    """Heads under way to the ranks that compute them."""

    pending: Pending
    rows: Tensor  # (n, elements)
    counts: list[int]
    dims: list[int]

    def wait(self) -> list[Tensor]:
        """The tensors, (n, this rank's heads, D) each, as views of one buffer."""
        comes_to("heads")
        self.pending.wait()
        return head_columns(self.rows, self.counts, self.dims)


class Columns(NamedTuple):
    """What a row of a message holds of each tensor: "query" heads (of a group) or "key" heads, and their dim."""

    of: str
    dim: int


class _Way(NamedTuple):
    """One direction of a message: the route in elements, where each head of each tensor is in what a rank packs or
    unpacks, the width of a row of this rank's heads, and how many heads of each tensor are in it."""

    route: Route
    slots: Slots
    width: int
    counts: list[int]


@dataclass(frozen=True)
class _Message:
    """How some heads travel."""

    exchange: Exchange
    heads: list[list[Sequence[int]]]  # of each rank, of each tensor
    dims: tuple[int, ...]

    @cached_property
    def starts(self) -> list[list[int]]:
        """Of each rank: where each tensor begins in a row of its heads; the last number is the row's width."""
        return [
            [0, *accumulate(len(one) * dim for one, dim in zip(per_rank, self.dims, strict=True))]
            for per_rank in self.heads
        ]

    @cached_property
    def widths(self) -> list[int]:
        return [starts[-1] for starts in self.starts]

    @cached_property
    def sending(self) -> _Way:
        """From a rank's tokens to all ranks' heads."""
        exchange = self.exchange
        rows, before = [stop - start for start, stop in exchange.rows], sum(self.widths[: exchange.rank])
        return self._way(
            Route(
                sends=tuple(exchange.own_rows * width for width in self.widths),
                receives=tuple(count * self.widths[exchange.rank] for count in rows),
                there=tuple(count * before for count in rows),
                most=max(rows) * sum(self.widths),
            )
        )

    @cached_property
    def returning(self) -> _Way:
        """From a rank's heads to all ranks' tokens."""
        exchange, mine = self.exchange, self.widths[self.exchange.rank]
        return self._way(
            Route(
                sends=tuple((stop - start) * mine for start, stop in exchange.rows),
                receives=tuple(exchange.own_rows * width for width in self.widths),
                there=tuple(exchange.rows[exchange.rank][0] * width for width in self.widths),
                most=exchange.position_rows * max(self.widths),
            )
        )

    def _way(self, route: Route) -> _Way:
        """Both ways a rank's own tokens lie by rank, each with the rank's heads side by side."""
        begins = [0, *accumulate(self.exchange.own_rows * width for width in self.widths)]
        slots = tuple(
            Slot(number, head, begins[rank] + self.starts[rank][number] + local * dim, self.widths[rank])
            for rank, per_rank in enumerate(self.heads)
            for number, dim in enumerate(self.dims)
            for local, head in enumerate(per_rank[number])
        )
        mine = self.exchange.rank
        return _Way(route, Slots(slots), self.widths[mine], [len(one) for one in self.heads[mine]])


@dataclass(frozen=True)
class Returning:
    """Results of heads under way to the ranks that hold the tokens."""

    pending: Pending
    received: Tensor
    slots: Slots

    def wait(self, targets: Sequence[Tensor]) -> None:
        """Fill the heads that travelled of each tensor (t, all heads, dim); gradients of a head's copies are added in
        the order of ranks."""
        comes_to("heads")
        self.pending.wait()
        unpack_heads(self.received, targets, self.slots)


@dataclass(frozen=True)
class HeadExchange:
    """The exchange of one group of heads by a transport. Whatever moves data is collective over the ulysses axis."""

    plan: Exchange
    transport: Transport
    group: int = 0

    @cached_property
    def groups(self) -> "tuple[HeadExchange, ...]":
        """This exchange for each group of heads."""
        return tuple(replace(self, group=group) for group in range(self.plan.groups))

    @property
    def last(self) -> bool:
        """Whether all other groups come before this one."""
        return self.group + 1 == self.plan.groups

    @property
    def own_keys(self) -> slice:
        """The key heads that the group reads, of those of this rank."""
        return slice(*self.plan.share.group(self.group, self.plan.groups)[1])

    def to_heads(self, queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Arriving:
        """This rank's tokens on their way to the heads of the group, of all tokens.

        Arguments:
            queries: (t, H, D) each -> (n, heads of the group, D).
            keys: (t, K, D) each -> (n, c, D), all key heads of a rank; one goes to every rank that reads it.
        """
        tensors = [*queries, *keys]
        columns = [Columns("query", x.shape[2]) for x in queries] + [Columns("key", x.shape[2]) for x in keys]
        way = self._message(columns).sending
        send = self.transport.buffer(way.route, tensors[0])
        pack_heads(tensors, send, way.slots)
        rows = send.new_empty(self.plan.position_rows, way.width)
        pending = self.transport.exchange(send, rows.view(-1), way.route)
        return Arriving(pending, rows, way.counts, [column.dim for column in columns])

    def open_message(self, columns: Sequence[Columns], like: Tensor) -> tuple[Tensor, list[Tensor]]:
        """A message buffer (n, elements) for the next `to_tokens`, and its columns (n, this rank's heads, dim) each."""
        way = self._message(columns).returning
        rows = self.transport.buffer(way.route, like).view(self.plan.position_rows, way.width)
        return rows, head_columns(rows, way.counts, [column.dim for column in columns])

    def to_tokens(self, rows: Tensor, columns: Sequence[Columns]) -> Returning:
        """The way back: this rank's heads of all tokens to all ranks' heads of its tokens.

        Arguments:
            rows: (n, elements): a message buffer of `open_message`, or any other tensor, which may have to be copied.
            columns: what they hold.
        """
        way = self._message(columns).returning
        received = rows.new_empty(way.route.received)
        message = self.transport.message(rows.contiguous().view(-1), way.route)
        return Returning(self.transport.exchange(message, received, way.route), received, way.slots)

    def _message(self, columns: Sequence[Columns]) -> _Message:
        """Kept with the plan: every layer of a step sends alike."""

        def make() -> _Message:
            heads: list[list[Sequence[int]]] = []
            for share in self.plan.heads:
                first, last = share.group(self.group, self.plan.groups)[0]
                queries = range(share.query[0] + first, share.query[0] + last)
                heads.append([queries if column.of == "query" else share.keys for column in columns])
            return _Message(self.plan, heads, tuple(column.dim for column in columns))

        return kept(self.plan, (*columns, self.group), make)
