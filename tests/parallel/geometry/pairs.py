"""Pieces of documents for hypothesis, and the pairs of rows that blocks allow, one by one."""

from collections.abc import Iterable

from hypothesis import strategies as st

from ringattn.kernels.spec import Block
from ringattn.mask import Band, Mask
from ringattn.parallel.geometry.blocks import Piece

Pairs = list[tuple[int, int]]  # query row, key row
BANDS = st.builds(Mask, st.booleans(), st.tuples(st.sampled_from([-1, 0, 2, 9]), st.sampled_from([-1, 0, 1, 6]))).map(
    lambda mask: mask.band
)


@st.composite
def queries_and_runs(draw: st.DrawFn, row: int = 0, key: int = 0, document: int = 0) -> tuple[Piece, list[Piece]]:
    """A query piece from `row` on, and ascending runs of keys of its document, in memory from `key` on."""
    first = draw(st.integers(0, 12))
    last = draw(st.integers(first + 1, first + 8))
    runs, position = [], 0
    for size, hidden, between in draw(
        st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3), st.sampled_from([0, 0, 2])), max_size=4)
    ):
        position, key = position + hidden, key + between
        runs.append(Piece(document, position, position + size, key))
        position, key = position + size, key + size
    return Piece(document, first, last, row), runs


def seen(query: Piece, runs: list[Piece], band: Band) -> Pairs:
    """What the band allows, by its definition."""
    lo, hi = (float("-inf") if band.lo is None else band.lo), (float("inf") if band.hi is None else band.hi)
    return [
        (query.row + i - query.first, run.row + j - run.first)
        for i in range(query.first, query.last)
        for run in runs
        for j in range(run.first, run.last)
        if lo <= j - i <= hi
    ]


def allowed(blocks: Iterable[Block], bands: Iterable[tuple[int, int]] | None = None) -> Pairs:
    """What blocks allow, under bands `(left, right)` of their own or given ones."""
    blocks = list(blocks)
    bands = [(block.left, block.right) for block in blocks] if bands is None else bands
    found = []
    for block, (left, right) in zip(blocks, bands, strict=True):
        n, m = block.q[1] - block.q[0], block.k[1] - block.k[0]
        for i in range(n):
            start = 0 if left < 0 else max(0, i + m - n - left)
            stop = m if right < 0 else min(m, i + m - n + right + 1)
            found += [(block.q[0] + i, block.k[0] + j) for j in range(start, stop)]
    return found
