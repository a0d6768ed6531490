"""The Ulysses exchange (DeepSpeed-Ulysses, arXiv 2309.14509): from a run of tokens with all heads to all tokens of the
ring position with some heads, and back. Uneven in both directions where heads or tokens do not divide.

All tensors of a pass travel in one message: a row of it holds a token's heads of each, side by side.

Legend: t local tokens, n tokens of the ring position, H query heads, K key heads, h and c this rank's share of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringattn.kernels.pack import Slot, Slots, pack_heads
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
    for x, slots in zip(tensors, plan.slots, strict=True):
        pack_heads(x, send, slots)
    rows = send.new_empty(exchange.position_rows, plan.width)
    return Arriving(transport.exchange(send, rows.view(-1), plan.route), rows, plan.counts, plan.dims)


class _Sending(NamedTuple):
    """How tokens' heads travel: the route in elements, and where each head of each tensor goes in the message."""

    slots: list[Slots]  # of each tensor
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
    slots = [
        Slots(
            tuple(
                Slot(head, starts[rank] + columns[rank][number] + local * dim, widths[rank])
                for rank, per_rank in enumerate(heads)
                for local, head in enumerate(per_rank[number])
            )
        )
        for number, dim in enumerate(dims)
    ]
    counts = [stop - start for start, stop in exchange.rows]
    before = sum(widths[: exchange.rank])
    route = Route(
        sends=tuple(own * width for width in widths),
        receives=tuple(rows * mine for rows in counts),
        there=tuple(rows * before for rows in counts),
        most=max(counts) * sum(widths),
    )
    return _Sending(slots, route, mine, [len(one) for one in heads[exchange.rank]], dims)


class Columns(NamedTuple):
    """What a row for `to_tokens` holds of each tensor: "query" or "key" heads, and their dim."""

    of: str
    dim: int


def joined(
    columns: Sequence[Columns], like: Tensor, exchange: Exchange, transport: Transport
) -> tuple[Tensor, list[Tensor]]:
    """A message buffer (n, elements) for the next `to_tokens`, and its columns (n, this rank's heads, dim) each."""
    route, widths, counts = _returning(exchange, tuple(columns))
    rows = transport.buffer(route, like).view(exchange.position_rows, widths[exchange.rank])
    return rows, _columns(rows, counts[exchange.rank], [dim for _, dim in columns])


@dataclass(frozen=True)
class Returning:
    """Results of heads under way to the ranks that hold the tokens."""

    pending: Pending
    received: Tensor
    route: Route
    own_rows: int
    widths: list[int]
    counts: list[list[int]]
    dims: list[int]

    def wait(self) -> list[list[Tensor]]:
        """For each tensor a list by rank of what it computed, (t, its heads, dim)."""
        self.pending.wait()
        by_rank = [
            _columns(
                part.view(self.own_rows, sum(c * d for c, d in zip(counts, self.dims, strict=True))), counts, self.dims
            )
            for part, counts in zip(self.received.split(self.route.receives), self.counts, strict=True)
        ]
        return [list(one) for one in zip(*by_rank, strict=True)]


def to_tokens(rows: Tensor, columns: Sequence[Columns], exchange: Exchange, transport: Transport) -> Returning:
    """The way back: this rank's heads of all tokens to all heads of this rank's tokens. Collective over the axis.

    Arguments:
        rows: (n, elements): a message buffer that `joined` gave, or any other tensor, which may have to be copied.
        columns: what they hold.
    """
    route, widths, counts = _returning(exchange, tuple(columns))
    received = rows.new_empty(route.received)
    pending = transport.exchange(transport.message(rows.contiguous().view(-1), route), received, route)
    return Returning(pending, received, route, exchange.own_rows, widths, counts, [dim for _, dim in columns])


def _returning(exchange: Exchange, columns: tuple[Columns, ...]) -> tuple[Route, list[int], list[list[int]]]:
    """The route in elements; by rank the width of its rows, and the heads of each tensor in them. Kept as above."""
    kept: dict[object, Any] = exchange.__dict__.setdefault("_returnings", {})
    if columns not in kept:
        counts = [[s.queries if of == "query" else len(s.keys) for of, _ in columns] for s in exchange.heads]
        widths = [sum(count * dim for count, (_, dim) in zip(one, columns, strict=True)) for one in counts]
        own, mine = exchange.own_rows, widths[exchange.rank]
        route = Route(
            sends=tuple((stop - start) * mine for start, stop in exchange.rows),
            receives=tuple(own * width for width in widths),
            there=tuple(exchange.rows[exchange.rank][0] * width for width in widths),
            most=exchange.position_rows * max(widths),
        )
        kept[columns] = route, widths, counts
    return kept[columns]


def all_queries(parts: Sequence[Tensor]) -> Tensor:
    """(t, H, D) from what each rank computed."""
    return torch.cat(list(parts), 1)


def all_keys(parts: Sequence[Tensor], exchange: Exchange, key_heads: int) -> Tensor:
    """(t, K, D), gradients of a head's copies added in the order of ranks; they must be in the precision for that."""
    if not exchange.copied_keys:
        return torch.cat(list(parts), 1)
    out = parts[0].new_zeros(parts[0].shape[0], key_heads, parts[0].shape[2])
    for part, share in zip(parts, exchange.heads, strict=True):
        for local, head in enumerate(share.keys):
            out[:, head] += part[:, local]
    return out


def _columns(rows: Tensor, counts: Sequence[int], dims: Sequence[int]) -> list[Tensor]:
    """Views (n, count, dim) of the columns of (n, sum of count * dim)."""
    widths = [count * dim for count, dim in zip(counts, dims, strict=True)]
    parts = rows.split(widths, dim=1)
    return [part.unflatten(1, (count, dim)) for part, count, dim in zip(parts, counts, dims, strict=True)]
