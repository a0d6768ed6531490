"""Placements: the definition of balance, over random documents and up to 64 ranks, without processes."""

import itertools
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn import Documents, Layout, Mask, MeshShape
from tests.parallel.cases import documents, masks

POLICIES = ("contiguous", "zigzag", "balanced")


def area(layout: Layout, rank: int) -> int:
    """Allowed pairs of the queries of a rank, from the documents alone."""
    docs = layout.docs.chunked(layout.mask.chunk)
    total = 0
    for begin, end in layout.ranges(rank):
        for start, size in zip(docs.starts, docs.lengths, strict=True):
            first, last = max(begin, start), min(end, start + size)
            if first < last:
                total += layout.mask.band.area(first - start, last - start, size)
    return total


def assert_every_token_once(layout: Layout) -> None:
    ranks = range(layout.mesh.sequence_size)
    held = sorted(span for rank in ranks for span in layout.ranges(rank))
    assert sum(stop - start for start, stop in held) == layout.docs.total
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(held))
    assert all(0 <= start < stop <= layout.docs.total for start, stop in held)


@settings(max_examples=150)
@given(
    docs=documents(longest=400, most=12),
    mask=masks,
    ring=st.integers(1, 9),
    ulysses=st.integers(1, 4),
    policy=st.sampled_from(POLICIES),
)
def test_every_token_has_one_place(docs: Documents, mask: Mask, ring: int, ulysses: int, policy: str) -> None:
    layout = Layout(docs, MeshShape(1, ring, ulysses), policy, mask)
    assert_every_token_once(layout)
    for rank in range(ring * ulysses):
        indices = layout.indices(rank)
        assert len(indices) == layout.tokens(rank)
        assert indices.tolist() == [token for span in layout.ranges(rank) for token in range(*span)]
    sizes = [layout.tokens(rank) for rank in range(ring * ulysses)]
    for position in range(ring):
        dealt = sizes[position * ulysses : (position + 1) * ulysses]
        assert max(dealt) - min(dealt) <= 1


@st.composite
def long_lengths(draw: st.DrawFn, share: int) -> tuple[int, list[int]]:
    """A ring size and document lengths that fill `share` tokens per rank: from one document to thousands."""
    ring = draw(st.integers(2, 64))
    total = ring * share
    low = draw(st.floats(0, 1))
    high = draw(st.floats(low, 1))
    copies = draw(st.integers(1, 30))
    random = Random(draw(st.integers(0, 10**6)))
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        length = max(int(total ** random.uniform(low, high)), total // 4000, 1)
        lengths += [min(length, left)] * min(random.randint(1, copies), left // min(length, left))
    random.shuffle(lengths)
    return ring, lengths


def assert_balanced(ring: int, lengths: list[int], limit: float) -> None:
    docs = Documents(lengths)
    layout = Layout(docs, MeshShape(1, ring, 1), "balanced")
    assert_every_token_once(layout)
    whole = {(start, start + size) for start, size in zip(docs.starts, docs.lengths, strict=True)}
    mean = docs.total / ring
    for rank in range(ring):
        # Neighbouring documents join to one range, so cuts are counted from the ends that are no document's.
        ends = {start for start, _ in whole} | {stop for _, stop in whole}
        cuts = sum((start not in ends) + (stop not in ends) for start, stop in layout.ranges(rank))
        assert abs(layout.tokens(rank) - mean) <= 128 * max(cuts, 1)
    areas = [area(layout, rank) for rank in range(ring)]
    assert max(areas) / (sum(areas) / ring) <= limit


@settings(max_examples=60)
@given(case=long_lengths(32768))
def test_balance_at_32768_tokens_a_rank(case: tuple[int, list[int]]) -> None:
    assert_balanced(*case, limit=1.02)


@settings(max_examples=60)
@given(case=long_lengths(8192))
def test_balance_at_8192_tokens_a_rank(case: tuple[int, list[int]]) -> None:
    assert_balanced(*case, limit=1.05)


def test_one_document_becomes_zigzag() -> None:
    layouts = [Layout(Documents([4096]), MeshShape(1, 4), policy) for policy in ("balanced", "zigzag")]
    assert next(layout.positions for layout in layouts) == layouts[1].positions


def test_whole_documents_then_heads_then_tails() -> None:
    layout = Layout(Documents([3000, 100, 5000, 40, 200]), MeshShape(1, 2), "balanced")
    docs = layout.docs
    starts = dict(zip(docs.starts, docs.lengths, strict=True))

    def room(span: tuple[int, int]) -> int:
        start, stop = span
        if start in starts:
            return 0 if stop - start >= starts[start] else 1
        return 2

    for ranges in layout.positions:
        assert [room(span) for span in ranges] == sorted(room(span) for span in ranges)


def test_padding_is_shared_and_last() -> None:
    docs = Documents([1000, 50], starts=[10, 2000], total=4000)
    layout = Layout(docs, MeshShape(1, 4), "balanced")
    assert all(abs(layout.tokens(rank) - 1000) <= 16 for rank in range(4))  # a small stream has small tiles
    for ranges in layout.positions:
        inside = [any(a <= start < b for a, b in ((10, 1010), (2000, 2050))) for start, _ in ranges]
        assert inside == sorted(inside, reverse=True)
