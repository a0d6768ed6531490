"""The recurrence in chunks of tokens, in plain torch: matrix products within a chunk, one state from chunk to chunk.

Exact: nothing is left out and no exponential of a positive sum of decays is formed. The delta rule's updates within a
chunk are the solution of a triangular system (the UT transform of Yang et al., "Parallelizing Linear Transformers with
the Delta Rule over Sequence Length", arXiv:2406.06484, with the gates of arXiv:2412.06464).

Legend: n pieces, N chunks of C tokens, H value heads, D key dim, V value dim.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.recurrent.kernels.contract import Inputs, Own, of_value_heads

CHUNK = 64
CHUNK_OF_DIAGONALS = 16  # decays by key dim make a D times larger table of a chunk's pairs


class Chunked(Own):
    """Chunks of all pieces are prepared together; states then walk through the chunks of all pieces at a time."""

    name = "torch"

    def run(self, x: Inputs, lengths: tuple[int, ...], state: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype, x = x.v.dtype, x.plain()
        if not lengths:
            return x.v.to(dtype), x.v.new_zeros(0, *x.state_shape, dtype=x.wide)
        cut = _cut(lengths, CHUNK if x.decay.dim() == 2 else CHUNK_OF_DIAGONALS)
        parts = _prepared(x, cut)
        if state is None:
            state = torch.zeros(len(lengths), *x.state_shape, dtype=x.wide, device=x.v.device)
        S = state[cut.order]
        outs, lasts = [], []
        for first, active in zip(cut.firsts, cut.actives, strict=True):
            if active < len(S):  # these pieces have ended
                lasts.append(S[active:])
                S = S[:active]
            at = slice(first, first + active)
            u = parts.values[at] if parts.reads is None else parts.values[at] - parts.reads[at] @ S
            outs.append(parts.queries[at] @ S + parts.scores[at] @ u)
            S = parts.left[at] * S + parts.keys[at].mT @ u
        lasts.append(S)
        last = torch.cat(lasts[::-1])[_inverse(cut.order)]
        out = torch.cat(outs).transpose(1, 2).flatten(0, 1)  # (N C, H, V)
        return out[cut.places(x.v.device)].to(dtype), last


class _Cut(NamedTuple):
    """How pieces are cut in chunks. Chunks stand in the order in which they are walked: the first of every piece, the
    longest piece first, then the second of every piece that has one, and so on.

    Arguments:
        order: pieces by length, the longest first.
        firsts, actives: of every step the first chunk and how many there are.
        begins: for every chunk its first row; `sizes` its tokens.
    """

    lengths: tuple[int, ...]
    chunk: int
    order: list[int]
    firsts: list[int]
    actives: list[int]
    begins: list[int]
    sizes: list[int]

    def rows(self, device: torch.device) -> Tensor:
        """(N, C): the row of every place of a chunk; the number of rows, one past the end, where there is none."""
        begins, sizes = (torch.tensor(one, device=device)[:, None] for one in (self.begins, self.sizes))
        place = torch.arange(self.chunk, device=device)
        return torch.where(place < sizes, begins + place, sum(self.lengths))

    def places(self, device: torch.device) -> Tensor:
        """(t,): where every row is among the places of all chunks."""
        rows = self.rows(device).flatten()
        out = rows.new_empty(sum(self.lengths) + 1)
        out[rows] = torch.arange(len(rows), device=device)
        return out[:-1]


class _Prepared(NamedTuple):
    """What of a chunk does not depend on the state at its head.

    Arguments:
        queries: (N, H, C, D), decayed from the chunk's head to the token.
        keys: (N, H, C, D), decayed from the token to the chunk's end.
        scores: (N, H, C, C), of queries with earlier and own keys.
        values: (N, H, C, V), what is added to the state if it is empty at the chunk's head.
        reads: (N, H, C, D), what the state at the head takes from that; None without the delta rule.
        left: (N, H, 1 or D, 1), what is left of the state at the chunk's end.
    """

    queries: Tensor
    keys: Tensor
    scores: Tensor
    values: Tensor
    reads: Tensor | None
    left: Tensor


def _cut(lengths: tuple[int, ...], chunk: int) -> _Cut:
    order = sorted(range(len(lengths)), key=lambda piece: -lengths[piece])
    starts = [0, *accumulate(lengths)]
    firsts: list[int] = []
    actives: list[int] = []
    begins: list[int] = []
    sizes: list[int] = []
    for step in range(-(-lengths[order[0]] // chunk)):
        active = [piece for piece in order if lengths[piece] > step * chunk]
        firsts.append(len(begins))
        actives.append(len(active))
        begins += [starts[piece] + step * chunk for piece in active]
        sizes += [min(chunk, lengths[piece] - step * chunk) for piece in active]
    return _Cut(lengths, chunk, order, firsts, actives, begins, sizes)


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _prepared(x: Inputs, cut: _Cut) -> _Prepared:
    heads = x.v.shape[1]
    rows = cut.rows(x.v.device)
    q, k = (_chunks(of_value_heads(one, heads).to(x.wide), rows) for one in (x.q, x.k))
    v, decay = _chunks(x.v.to(x.wide), rows), _chunks(x.decay.to(x.wide), rows)
    total = (decay if decay.dim() == 4 else decay[..., None]).cumsum(2)  # (N, H, C, 1 or D)
    later = torch.ones(cut.chunk, cut.chunk, dtype=torch.bool, device=v.device).triu(1)
    pairs = (total[:, :, :, None] - total[:, :, None]).masked_fill(later[..., None], float("-inf")).exp()
    scores = _scores(q, k, pairs)
    from_head, to_end = total.exp(), (total[:, :, -1:] - total).exp()
    values, reads = v, None
    if x.beta is not None:
        beta = _chunks(x.beta.to(x.wide), rows)[..., None]
        # The diagonal is taken as ones by the solver, and what stands above is 0.
        system = beta * _scores(k, k, pairs)
        sides = torch.cat([beta * v, beta * k * from_head], -1)
        solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
        values, reads = solved.split([v.shape[-1], k.shape[-1]], -1)
    return _Prepared(q * from_head, k * to_end, scores, values, reads, total[:, :, -1].exp()[..., None])


def _scores(q: Tensor, k: Tensor, pairs: Tensor) -> Tensor:
    """Products of every query with every key, decayed between them: (N, H, C, C)."""
    if pairs.shape[-1] == 1:
        return (q @ k.mT) * pairs[..., 0]
    return torch.einsum("nhid,nhjd,nhijd->nhij", q, k, pairs)


def _chunks(x: Tensor, rows: Tensor) -> Tensor:
    """(t, H, ...) -> (N, H, C, ...), zeros where a chunk has no row."""
    padded = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    return padded[rows].transpose(1, 2)
