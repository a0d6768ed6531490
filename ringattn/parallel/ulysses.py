"""The Ulysses exchange (DeepSpeed-Ulysses, arXiv 2309.14509): from a run of tokens with all heads to all tokens of the
ring position with some heads, and back. Uneven in both directions where heads or tokens do not divide.

Legend: t local tokens, n tokens of the ring position, H query heads, K key heads, h and c this rank's share of them.
"""

from itertools import pairwise

import torch

from ringattn.kernels.spec import Range
from ringattn.parallel.plan import Exchange, HeadShare
from ringattn.parallel.ranges import touching
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


def queries_to_heads(x: torch.Tensor, exchange: Exchange, transport: Transport) -> torch.Tensor:
    """(t, H, D) of this rank's tokens -> (n, h, D) of this rank's heads. Collective over the ulysses axis."""
    return _to_heads(x, exchange, transport, [[share.query] for share in exchange.heads])


def keys_to_heads(x: torch.Tensor, exchange: Exchange, transport: Transport) -> torch.Tensor:
    """(t, K, D) -> (n, c, D); a key head goes to every rank that reads it. Collective over the ulysses axis."""
    return _to_heads(x, exchange, transport, [_runs(share) for share in exchange.heads])


def queries_to_tokens(x: torch.Tensor, exchange: Exchange, transport: Transport) -> torch.Tensor:
    """(n, h, D) -> (t, H, D): the way back, for outputs and the gradients of queries."""
    return torch.cat(_to_tokens(x, exchange, transport, [share.queries for share in exchange.heads]), 1)


def key_grads_to_tokens(x: torch.Tensor, exchange: Exchange, transport: Transport, key_heads: int) -> torch.Tensor:
    """(n, c, D) -> (t, K, D): gradients of keys, those of a head's copies added in the order of ranks.

    `x` must be in the precision in which copies are to be added.
    """
    parts = _to_tokens(x, exchange, transport, [len(share.keys) for share in exchange.heads])
    if not exchange.copied_keys:
        return torch.cat(parts, 1)
    out = parts[0].new_zeros(parts[0].shape[0], key_heads, x.shape[2])
    for part, share in zip(parts, exchange.heads, strict=True):
        for local, head in enumerate(share.keys):
            out[:, head] += part[:, local]
    return out


def _to_heads(x: torch.Tensor, exchange: Exchange, transport: Transport, shares: list[list[Range]]) -> torch.Tensor:
    """Send each rank the heads of its ranges; what arrives lies in the order of tokens already."""
    own, dim = exchange.own_rows, x.shape[2]
    counts = [sum(stop - start for start, stop in ranges) for ranges in shares]
    send = x.new_empty(own * sum(counts) * dim)
    sizes = [own * count * dim for count in counts]
    for part, count, ranges in zip(send.split(sizes), counts, shares, strict=True):
        target, head = part.view(own, count, dim), 0
        for start, stop in ranges:
            target[:, head : head + stop - start] = x[:, start:stop]
            head += stop - start
    mine = counts[exchange.rank]
    out = x.new_empty(exchange.position_rows, mine, dim)
    receive_sizes = [(stop - start) * mine * dim for start, stop in exchange.rows]
    transport.exchange(send, out.view(-1), sizes, receive_sizes).wait()
    return out


def _to_tokens(x: torch.Tensor, exchange: Exchange, transport: Transport, counts: list[int]) -> list[torch.Tensor]:
    """Send each rank its tokens, which lie together; return what each rank sent, (t, its heads, D)."""
    own, (_, mine, dim) = exchange.own_rows, x.shape
    send_sizes = [(stop - start) * mine * dim for start, stop in exchange.rows]
    receive_sizes = [own * count * dim for count in counts]
    received = x.new_empty(sum(receive_sizes))
    transport.exchange(x.contiguous().view(-1), received, send_sizes, receive_sizes).wait()
    return [part.view(own, count, dim) for part, count in zip(received.split(receive_sizes), counts, strict=True)]


def _runs(share: HeadShare) -> list[Range]:
    """Key heads as slices: indexing with a list would send it to the device."""
    return list(touching((head, head + 1) for head in share.keys))
