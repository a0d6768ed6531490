"""The Ulysses exchange (DeepSpeed-Ulysses, arXiv 2309.14509): from a run of tokens with all heads to all tokens of the
ring position with some heads, and back. Uneven in both directions where heads or tokens do not divide.

All tensors of a pass travel in one message: a row of it holds a token's heads of each, side by side.

Legend: t local tokens, n tokens of the ring position, H query heads, K key heads, h and c this rank's share of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Arriving:
    """Heads under way to the ranks that compute them."""

    pending: Pending
    rows: Tensor  # (n, elements)
    counts: list[int]
    dims: list[int]

    def wait(self) -> list[Tensor]:
        """The tensors, (n, this rank's heads, D) each, as views of one buffer."""
        self.pending.wait()
        return head_columns(self.rows, self.counts, self.dims)


def to_heads(
    queries: Sequence[Tensor], keys: Sequence[Tensor], exchange: Exchange, transport: Transport, group: int = 0
) -> Arriving:
    """This rank's tokens on their way to a group of the heads of all tokens. Collective over the ulysses axis.

    Arguments:
        queries: (t, H, D) each -> (n, heads of the group, D).
        keys: (t, K, D) each -> (n, c, D), all key heads of a rank; one goes to every rank that reads it.
    """
    tensors = [*queries, *keys]
    columns = [Columns("query", x.shape[2]) for x in queries] + [Columns("key", x.shape[2]) for x in keys]
    plan = _message_of(exchange, tuple(columns), group).sending
    send = transport.buffer(plan.route, tensors[0])
    pack_heads(tensors, send, plan.slots)
    rows = send.new_empty(exchange.position_rows, plan.width)
    return Arriving(transport.exchange(send, rows.view(-1), plan.route), rows, plan.counts, [d for _, d in columns])


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
    """How some heads travel. Kept with the exchange: every layer of a step sends alike."""

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


def _message_of(exchange: Exchange, columns: tuple[Columns, ...], group: int) -> _Message:
    def make() -> _Message:
        heads: list[list[Sequence[int]]] = []
        for share in exchange.heads:
            first, last = share.group(group, exchange.groups)[0]
            queries = range(share.query[0] + first, share.query[0] + last)
            heads.append([queries if of == "query" else share.keys for of, _ in columns])
        return _Message(exchange, heads, tuple(dim for _, dim in columns))

    return kept(exchange, (columns, group), make)


def open_message(
    columns: Sequence[Columns], like: Tensor, exchange: Exchange, transport: Transport, group: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """A message buffer (n, elements) for the next `to_tokens`, and its columns (n, this rank's heads, dim) each."""
    way = _message_of(exchange, tuple(columns), group).returning
    rows = transport.buffer(way.route, like).view(exchange.position_rows, way.width)
    return rows, head_columns(rows, way.counts, [dim for _, dim in columns])


@dataclass(frozen=True)
class Returning:
    """Results of heads under way to the ranks that hold the tokens."""

    pending: Pending
    received: Tensor
    slots: Slots

    def wait(self, targets: Sequence[Tensor]) -> None:
        """Fill the heads that travelled of each tensor (t, all heads, dim); gradients of a head's copies are added in
        the order of ranks."""
        self.pending.wait()
        unpack_heads(self.received, targets, self.slots)


def to_tokens(
    rows: Tensor, columns: Sequence[Columns], exchange: Exchange, transport: Transport, group: int = 0
) -> Returning:
    """The way back: this rank's heads of all tokens to all ranks' heads of its tokens. Collective over the axis.

    Arguments:
        rows: (n, elements): a message buffer of `open_message`, or any other tensor, which may have to be copied.
        columns: what they hold.
    """
    way = _message_of(exchange, tuple(columns), group).returning
    received = rows.new_empty(way.route.received)
    message = transport.message(rows.contiguous().view(-1), way.route)
    return Returning(transport.exchange(message, received, way.route), received, way.slots)
