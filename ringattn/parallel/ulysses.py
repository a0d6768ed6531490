"""The Ulysses exchange (DeepSpeed-Ulysses, arXiv 2309.14509): from a run of tokens with all heads to all tokens of the
ring position with some heads, and back. Uneven in both directions where heads or tokens do not divide.

All tensors of a pass travel in one message: a row of it holds a token's heads of each, side by side.

Legend: t local tokens, n tokens of the ring position, H query heads, K key heads, h and c this rank's share of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

from torch import Tensor

from ringattn.kernels.pack import Slot, Slots, pack_heads, unpack_heads
from ringattn.kernels.spec import Range
from ringattn.parallel.plan import Exchange, HeadShare, Route
from ringattn.parallel.transport import Pending, Transport


def exchange_plan(rows: tuple[Range, ...], query_heads: int, key_heads: int, rank: int) -> Exchange:
    """Deal `query_heads` over the ranks as evenly as whole heads allow, each with the key heads that they read."""
    ranks = len(rows)
    bounds = [-(-index * query_heads // ranks) for index in range(ranks + 1)]
    heads = tuple(_share(bounds, query_heads // key_heads) for bounds in pairwise(bounds))
    return Exchange(rows, heads, rank)


def _share(query: Range, group: int) -> HeadShare:
    """Key heads of the query heads `query`, each as few times as a kernel with equal groups can work with."""
    needed = [head // group for head in range(*query)]
    for size in range(len(needed), 0, -1):
        parts = [needed[start : start + size] for start in range(0, len(needed), size)]
        if len(needed) % size == 0 and all(len(set(part)) == 1 for part in parts):
            return HeadShare(query, tuple(part[0] for part in parts))
    return HeadShare(query, ())


@dataclass(frozen=True)
class Arriving:
    """Heads under way to the ranks that compute them."""

    pending: Pending
    rows: Tensor  # (n, elements)
    counts: list[int]
    dims: tuple[int, ...]

    def wait(self) -> list[Tensor]:
        """The tensors, (n, this rank's heads, D) each, as views of one buffer."""
        self.pending.wait()
        return _columns(self.rows, self.counts, self.dims)


def to_heads(queries: Sequence[Tensor], keys: Sequence[Tensor], exchange: Exchange, transport: Transport) -> Arriving:
    """This rank's tokens on their way to the heads of all tokens. Collective over the ulysses axis.

    Arguments:
        queries: (t, H, D) each -> (n, h, D).
        keys: (t, K, D) each -> (n, c, D); a key head goes to every rank that reads it.
    """
    tensors = [*queries, *keys]
    plan = _sending(exchange, ("query",) * len(queries) + ("key",) * len(keys), tuple(x.shape[2] for x in tensors))
    send = transport.buffer(plan.route, tensors[0])
    pack_heads(tensors, send, plan.slots)
    rows = send.new_empty(exchange.position_rows, plan.width)
    return Arriving(transport.exchange(send, rows.view(-1), plan.route), rows, plan.counts, plan.dims)


class _Sending(NamedTuple):
    """How tokens' heads travel: the route in elements, and where each head of each tensor goes in the message."""

    slots: Slots
    route: Route
    width: int  # of a row that arrives
    counts: list[int]  # heads of each tensor in it
    dims: tuple[int, ...]


def _sending(exchange: Exchange, of: tuple[str, ...], dims: tuple[int, ...]) -> _Sending:
    """Kept with the exchange: every layer of a step sends alike."""
    kept: dict[tuple[object, ...], _Sending] = exchange.__dict__.setdefault("_sendings", {})
    if (of, dims) not in kept:
        kept[of, dims] = _planned_sending(exchange, of, dims)
    return kept[of, dims]


def _planned_sending(exchange: Exchange, of: tuple[str, ...], dims: tuple[int, ...]) -> _Sending:
    heads = [[range(*share.query) if one == "query" else share.keys for one in of] for share in exchange.heads]
    columns = [[0, *accumulate(len(one) * dim for one, dim in zip(part, dims, strict=True))] for part in heads]
    widths = [ends[-1] for ends in columns]
    own, mine = exchange.own_rows, widths[exchange.rank]
    starts = [0, *accumulate(own * width for width in widths)]
    slots = tuple(
        Slot(number, head, starts[rank] + columns[rank][number] + local * dim, widths[rank])
        for rank, per_rank in enumerate(heads)
        for number, dim in enumerate(dims)
        for local, head in enumerate(per_rank[number])
    )
    counts = [stop - start for start, stop in exchange.rows]
    before = sum(widths[: exchange.rank])
    route = Route(
        sends=tuple(own * width for width in widths),
        receives=tuple(rows * mine for rows in counts),
        there=tuple(rows * before for rows in counts),
        most=max(counts) * sum(widths),
    )
    return _Sending(Slots(slots), route, mine, [len(one) for one in heads[exchange.rank]], dims)


class Columns(NamedTuple):
    """What a row for `to_tokens` holds of each tensor: "query" or "key" heads, and their dim."""

    of: str
    dim: int


def joined(
    columns: Sequence[Columns], like: Tensor, exchange: Exchange, transport: Transport
) -> tuple[Tensor, list[Tensor]]:
    """A message buffer (n, elements) for the next `to_tokens`, and its columns (n, this rank's heads, dim) each."""
    plan = _returning(exchange, tuple(columns))
    rows = transport.buffer(plan.route, like).view(exchange.position_rows, plan.width)
    return rows, _columns(rows, plan.counts, [dim for _, dim in columns])


@dataclass(frozen=True)
class Returning:
    """Results of heads under way to the ranks that hold the tokens."""

    pending: Pending
    received: Tensor
    slots: Slots

    def wait(self, targets: Sequence[Tensor]) -> None:
        """Fill (t, all heads, dim) of each tensor; gradients of a head's copies are added in the order of ranks."""
        self.pending.wait()
        unpack_heads(self.received, targets, self.slots)


def to_tokens(rows: Tensor, columns: Sequence[Columns], exchange: Exchange, transport: Transport) -> Returning:
    """The way back: this rank's heads of all tokens to all heads of this rank's tokens. Collective over the axis.

    Arguments:
        rows: (n, elements): a message buffer that `joined` gave, or any other tensor, which may have to be copied.
        columns: what they hold.
    """
    plan = _returning(exchange, tuple(columns))
    received = rows.new_empty(plan.route.received)
    message = transport.message(rows.contiguous().view(-1), plan.route)
    return Returning(transport.exchange(message, received, plan.route), received, plan.slots)


class _Returning(NamedTuple):
    """The route in elements, where every head of every tensor arrives, and of this rank's rows the widths."""

    route: Route
    slots: Slots
    width: int
    counts: list[int]  # heads of each tensor


def _returning(exchange: Exchange, columns: tuple[Columns, ...]) -> _Returning:
    """Kept with the exchange, as `_sending`."""
    kept: dict[object, _Returning] = exchange.__dict__.setdefault("_returnings", {})
    if columns not in kept:
        kept[columns] = _planned_returning(exchange, columns)
    return kept[columns]


def _planned_returning(exchange: Exchange, columns: tuple[Columns, ...]) -> _Returning:
    heads = [[range(*share.query) if of == "query" else share.keys for of, _ in columns] for share in exchange.heads]
    starts = [[0, *accumulate(len(one) * dim for one, (_, dim) in zip(part, columns, strict=True))] for part in heads]
    widths = [ends[-1] for ends in starts]
    own, mine = exchange.own_rows, widths[exchange.rank]
    route = Route(
        sends=tuple((stop - start) * mine for start, stop in exchange.rows),
        receives=tuple(own * width for width in widths),
        there=tuple(exchange.rows[exchange.rank][0] * width for width in widths),
        most=exchange.position_rows * max(widths),
    )
    slots = tuple(
        Slot(number, head, route.begins[rank] + starts[rank][number] + local * dim, widths[rank])
        for rank, per_rank in enumerate(heads)
        for number, (_, dim) in enumerate(columns)
        for local, head in enumerate(per_rank[number])
    )
    return _Returning(route, Slots(slots), mine, [len(one) for one in heads[exchange.rank]])


def _columns(rows: Tensor, counts: Sequence[int], dims: Sequence[int]) -> list[Tensor]:
    """Views (n, count, dim) of the columns of (n, sum of count * dim)."""
    widths = [count * dim for count, dim in zip(counts, dims, strict=True)]
    parts = rows.split(widths, dim=1)
    return [part.unflatten(1, (count, dim)) for part, count, dim in zip(parts, counts, dims, strict=True)]
