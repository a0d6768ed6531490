"""The Ulysses exchange (DeepSpeed-Ulysses, arXiv 2309.14509): from a run of tokens with all heads to all tokens of the
ring position with some heads, and back. Uneven in both directions where heads or tokens do not divide.

Legend: t local tokens, n tokens of the ring position, H query heads, K key heads, h and c this rank's share of them.
"""

import itertools

import torch

from ringattn.kernels.spec import Range
from ringattn.parallel.plan import Exchange, HeadShare
from ringattn.parallel.transport import Transport


def exchange_plan(rows: tuple[Range, ...], query_heads: int, key_heads: int, rank: int) -> Exchange:
    """Deal `query_heads` over the ranks as evenly as whole heads allow, each with the key heads that they read."""
    ranks = len(rows)
    bounds = [-(-index * query_heads // ranks) for index in range(ranks + 1)]
    heads = tuple(_share((a, b), query_heads // key_heads) for a, b in itertools.pairwise(bounds))
    return Exchange(rows, heads, rank)


def _share(query: Range, group: int) -> HeadShare:
    """Key heads of the query heads `query`, each as few times as a kernel with equal groups can work with."""
    needed = [head // group for head in range(*query)]
    for size in range(len(needed), 0, -1):
        parts = [needed[start : start + size] for start in range(0, len(needed), size)]
        if len(needed) % size == 0 and all(len(set(part)) == 1 for part in parts):
            return HeadShare(query, tuple(part[0] for part in parts))
    return HeadShare(query, ())


def to_heads(x: torch.Tensor, exchange: Exchange, transport: Transport, keys: bool) -> torch.Tensor:
    """(t, H or K, D) of this rank's tokens -> (n, h or c, D) of this rank's heads. Collective over the ulysses axis."""
    dim = x.shape[2]
    own = exchange.own_rows
    counts = _head_counts(exchange, keys)
    if keys:
        parts = [x[:, _index(share.keys)] for share in exchange.heads]
    else:
        parts = [x[:, share.query[0] : share.query[1]] for share in exchange.heads]
    send = torch.cat([part.reshape(-1) for part in parts])
    mine = counts[exchange.rank]
    out = x.new_empty(exchange.position_rows, mine, dim)
    send_sizes = [own * count * dim for count in counts]
    receive_sizes = [(stop - start) * mine * dim for start, stop in exchange.rows]
    transport.exchange(send, out.view(-1), send_sizes, receive_sizes).wait()
    return out


def to_tokens(x: torch.Tensor, exchange: Exchange, transport: Transport, total_heads: int, keys: bool) -> torch.Tensor:
    """The way back: (n, h or c, D) -> (t, H or K, D). Copies of a key head are added in the order of ranks.

    `x` of key heads holds gradients, in the precision in which they are to be added.
    """
    dim = x.shape[2]
    own = exchange.own_rows
    counts = _head_counts(exchange, keys)
    mine = counts[exchange.rank]
    send_sizes = [(stop - start) * mine * dim for start, stop in exchange.rows]
    receive_sizes = [own * count * dim for count in counts]
    received = x.new_empty(sum(receive_sizes))
    transport.exchange(x.contiguous().view(-1), received, send_sizes, receive_sizes).wait()
    parts = [part.view(own, count, dim) for part, count in zip(received.split(receive_sizes), counts, strict=True)]
    if not keys:
        return torch.cat(parts, 1)
    out = x.new_zeros(own, total_heads, dim)
    for part, share in zip(parts, exchange.heads, strict=True):
        for local, head in enumerate(share.keys):
            out[:, head] += part[:, local]
    return out


def _head_counts(exchange: Exchange, keys: bool) -> list[int]:
    return [len(share.keys) if keys else share.queries for share in exchange.heads]


def _index(keys: tuple[int, ...]) -> slice | list[int]:
    """A slice where the heads are consecutive: indexing with a list copies, and sends the list to the device."""
    if keys and keys == tuple(range(keys[0], keys[-1] + 1)):
        return slice(keys[0], keys[-1] + 1)
    return list(keys) if keys else slice(0, 0)
