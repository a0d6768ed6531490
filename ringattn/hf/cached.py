"""Keys kept from a forward pass, each where its rank holds it, and attention of one new token of each document to them.

For evaluation only: a few answers of tens of tokens after prompts that are too long for one device. Every rank computes
every new token, attends to the keys that it holds, and the partial results are merged by their log-sum-exp, as those of
the ring are. There are no pages, no batching of requests and no kernel of its own: plain torch, in float32 at least.

Legend: P sequence ranks, n documents, H query heads, K key heads, D head dim, V value head dim, m keys of a document on
this rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ringattn.kernels.merge import apply_sinks_, plain_merge_
from ringattn.mask import Mask
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh.mesh import SequenceMesh

Kept = tuple[Tensor, Tensor]  # keys (m + room, K, D) and values (m + room, K, V) of a document


class KeyCache:
    """The keys and values of this rank, by attention layer and document.

    Arguments:
        layout: of the prompts, one document each, none of them empty.
        mesh: the ranks.
        room: new tokens of each document that will follow; they go to the ranks in turn.
    """

    def __init__(self, layout: Layout, mesh: SequenceMesh, room: int) -> None:
        self.mesh, self.room = mesh, room
        self.lengths = layout.docs.lengths
        indices = layout.indices()
        starts = torch.tensor(layout.docs.starts, device="cpu")
        owner = torch.searchsorted(starts, indices, right=True) - 1
        rows = [(owner == number).nonzero()[:, 0] for number in range(len(self.lengths))]
        self._rows = [one.to(mesh.device) for one in rows]
        own = torch.arange(mesh.sequence_rank, room, mesh.sequence_size)  # of the new tokens
        self._positions = [
            torch.cat([indices[one] - start, length + own]).to(mesh.device)
            for one, start, length in zip(rows, layout.docs.starts, self.lengths, strict=True)
        ]
        self._kept: dict[nn.Module, list[Kept]] = {}

    def take(self, module: nn.Module, k: Tensor, v: Tensor) -> None:
        """Keeps this rank's keys (t, K, D) and values (t, K, V) of an attention layer."""
        self._kept[module] = [(self._with_room(k, rows), self._with_room(v, rows)) for rows in self._rows]

    def _with_room(self, x: Tensor, rows: Tensor) -> Tensor:
        here, size = self.mesh.sequence_rank, self.mesh.sequence_size
        kept = x.new_empty(len(rows) + len(range(here, self.room, size)), *x.shape[1:])
        torch.index_select(x, 0, rows, out=kept[: len(rows)])
        return kept

    def add(self, module: nn.Module, number: int, k: Tensor, v: Tensor) -> None:
        """Keeps the keys (n, K, D) and values (n, K, V) of new token `number` of each document, on one of the ranks."""
        turn, owner = divmod(number, self.mesh.sequence_size)
        if owner != self.mesh.sequence_rank:
            return
        for (keys, values), rows, new_k, new_v in zip(self._kept[module], self._rows, k, v, strict=True):
            keys[len(rows) + turn] = new_k
            values[len(rows) + turn] = new_v

    def seen(self, module: nn.Module, document: int, number: int, mask: Mask) -> Kept:
        """The keys and values of this rank that new token `number` of a document sees, itself included."""
        size, rank = self.mesh.sequence_size, self.mesh.sequence_rank
        there = len(self._rows[document]) + len(range(rank, number + 1, size))
        k, v = (x[:there] for x in self._kept[module][document])
        at = self.lengths[document] + number
        first = 0 if mask.band.lo is None else at + mask.band.lo
        first = first if mask.chunk is None else max(first, at // mask.chunk * mask.chunk)
        if first <= 0:
            return k, v
        inside = self._positions[document][:there] >= first
        return k[inside], v[inside]


class DecodeStep:
    """Stands where the layout of a batch would: the batch is one new token of each document, the same on every rank.

    Arguments:
        number: of the new token, from 0.
    """

    def __init__(self, cache: KeyCache, number: int) -> None:
        self.cache, self.number = cache, number

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """(n, H, D), (n, K, D), (n, K, V) -> (n, H, V), the same on every rank. Collective over the sequence ranks.

        Raises NotImplementedError for attention that is not causal.
        """
        mask: Mask = options["mask"]
        if not mask.causal:
            raise NotImplementedError(
                f"{type(module).__name__} asks for {mask}: cached decoding is for causal attention"
            )
        self.cache.add(module, self.number, k, v)
        wide = torch.promote_types(q.dtype, torch.float32)
        parts = [
            _attend(one.to(wide), *self.cache.seen(module, document, self.number, mask), options)
            for document, one in enumerate(q)
        ]
        out, lse = torch.stack([one for one, _ in parts]), torch.stack([one for _, one in parts], 1)
        out, lse = _merged(out, lse, self.cache.mesh)
        if options["sinks"] is not None:
            apply_sinks_(out, lse, options["sinks"])
        return out.to(q.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """One query (H, D) over keys (m, K, D) and values (m, K, V), all of which it sees: out (H, V) and lse (H,)."""
    if not len(k):
        return q.new_zeros(q.shape[0], v.shape[-1]), q.new_full((q.shape[0],), -torch.inf)
    k, v = k.to(q.dtype), v.to(q.dtype)
    scale = q.shape[-1] ** -0.5 if options["softmax_scale"] is None else options["softmax_scale"]
    scores = torch.einsum("kgd,mkd->kgm", q.unflatten(0, (k.shape[1], -1)), k) * scale
    if softcap := options["softcap"]:
        scores = softcap * torch.tanh(scores / softcap)
    lse = torch.logsumexp(scores, -1, keepdim=True)
    out = torch.einsum("kgm,mkv->kgv", torch.exp(scores - lse), v)
    return out.flatten(0, 1), lse.flatten()


def _merged(out: Tensor, lse: Tensor, mesh: SequenceMesh) -> tuple[Tensor, Tensor]:
    """The results of all ranks, out (n, H, V) and lse (H, n), merged in the order of ranks."""
    if mesh.sequence_size == 1:
        return out, lse
    mine = torch.cat([out, lse.T[..., None]], -1)
    parts = [torch.empty_like(mine) for _ in range(mesh.sequence_size)]
    dist.all_gather(parts, mine, group=mesh.sequence_group)
    total, total_lse = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    for part in parts:
        plain_merge_(total, total_lse, part[..., :-1], part[..., -1].T)
    return total, total_lse
