"""The Ulysses exchange (DeepSpeed-Ulysses, arXiv 2309.14509): from a run of tokens with all heads to all tokens of the
ring position with some heads, and back. Uneven in both directions where heads or tokens do not divide.

All tensors of a pass travel in one message: a row of it holds a token's heads of each, side by side.

Legend: t local tokens, n tokens of the ring position, H query heads, K key heads, h and c this rank's share of them.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.kernels.pack import Slot, Slots, pack_heads
from ringattn.kernels.spec import Range
from ringattn.parallel.plan import Exchange, HeadShare
from ringattn.parallel.transport import Transport


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


def to_heads(
    queries: Sequence[Tensor], keys: Sequence[Tensor], exchange: Exchange, transport: Transport
) -> list[Tensor]:
    """This rank's tokens -> this rank's heads of all tokens, as views of one buffer. Collective over the ulysses axis.

    Arguments:
        queries: (t, H, D) each -> (n, h, D).
        keys: (t, K, D) each -> (n, c, D); a key head goes to every rank that reads it.
    """
    tensors = [*queries, *keys]
    plan = _sending(exchange, ("query",) * len(queries) + ("key",) * len(keys), tuple(x.shape[2] for x in tensors))
    send = tensors[0].new_empty(sum(plan.send_sizes))
    for x, slots in zip(tensors, plan.slots, strict=True):
        pack_heads(x, send, slots)
    received = send.new_empty(exchange.position_rows, plan.width)
    transport.exchange(send, received.view(-1), plan.send_sizes, plan.receive_sizes).wait()
    return _columns(received, plan.counts, plan.dims)


class _Sending(NamedTuple):
    """How tokens' heads travel: sizes in elements, and where each head of each tensor goes in the message."""

    slots: list[Slots]  # of each tensor
    send_sizes: list[int]  # to each rank
    receive_sizes: list[int]
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
    return _Sending(
        slots,
        [own * width for width in widths],
        [(stop - start) * mine for start, stop in exchange.rows],
        mine,
        [len(one) for one in heads[exchange.rank]],
        dims,
    )


def joined(like: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A buffer of rows for `to_tokens`, (n, all heads' elements), and its columns shaped as `like`, (n, h, D) each."""
    widths = [x.shape[1] * x.shape[2] for x in like]
    buffer = like[0].new_empty(like[0].shape[0], sum(widths))
    return buffer, _columns(buffer, [x.shape[1] for x in like], [x.shape[2] for x in like])


def to_tokens(buffer: Tensor, columns: Sequence[tuple[str, int]], exchange: Exchange, transport: Transport) -> list:
    """The way back: this rank's heads of all tokens -> all heads of this rank's tokens. Collective over the axis.

    Arguments:
        buffer: (n, elements), rows as `joined` lays them out.
        columns: what they hold: "query" or "key" heads, and their dim.

    Returns for each a list by rank of what it computed, (t, its heads, D).
    """
    counts = [[share.queries if of == "query" else len(share.keys) for of, _ in columns] for share in exchange.heads]
    dims = [dim for _, dim in columns]
    widths = [sum(count * dim for count, dim in zip(per_rank, dims, strict=True)) for per_rank in counts]
    own, mine = exchange.own_rows, widths[exchange.rank]
    send_sizes = [(stop - start) * mine for start, stop in exchange.rows]
    receive_sizes = [own * width for width in widths]
    received = buffer.new_empty(sum(receive_sizes))
    transport.exchange(buffer.contiguous().view(-1), received, send_sizes, receive_sizes).wait()
    parts = received.split(receive_sizes)
    by_rank = [
        _columns(part.view(own, width), per_rank, dims)
        for part, width, per_rank in zip(parts, widths, counts, strict=True)
    ]
    return [list(one) for one in zip(*by_rank, strict=True)]


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
