"""Placements: the definition of balance, over random documents and up to 64 ranks, without processes."""

import itertools
from bisect import bisect_right
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.balance import balance
from ringattn import Documents, Layout, Mask, MeshShape
from ringattn.kernels.spec import Block, Call
from ringattn.parallel.geometry.block_table import BlockTable
from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.parallel.placement.cuts import nested_by_cost
from ringattn.parallel.placement.load import Load
from ringattn.parallel.placement.pieces import PieceTable
from ringattn.parallel.schedules.demand import KeyDemand, sum_by
from ringattn.workloads import HISTOGRAMS
from tests.strategies import documents, masks

POLICIES = ("contiguous", "zigzag", "balanced")


def area(layout: Layout, rank: int) -> int:
    """Allowed pairs of the queries of a rank, from the documents alone."""
    docs = layout.docs.chunked(layout.masks[0][0].chunk)
    total = 0
    for begin, end in layout.ranges(rank):
        for start, size in zip(docs.starts, docs.lengths, strict=True):
            first, last = max(begin, start), min(end, start + size)
            if first < last:
                total += layout.masks[0][0].band.area(first - start, last - start, size)
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


# What every layer of a model costs (one mask, or full attention and others in turn), and largest over mean cost. The
# first rows of a document see fewer keys than a window has, and a chunk that is shorter than its document ends dear: a
# share of such a document costs a little more or less than its tokens' part.
LOADS = (
    ([(Mask(), 1)], 1.02),
    ([(Mask(causal=False), 1)], 1.02),
    ([(Mask(chunk=2048), 1)], 1.02),
    ([(Mask(window=(1023, 0)), 1)], 1.05),
    ([(Mask(causal=False, window=(300, 300)), 1)], 1.05),
    ([(Mask(), 1), (Mask(window=(511, 0)), 5)], 1.05),
    ([(Mask(), 2), (Mask(chunk=2048), 6)], 1.05),
)


def costs(layout: Layout) -> list[float]:
    """Pairs of every position, summed over the layers."""
    out = [0.0] * layout.mesh.ring
    for mask, layers in layout.masks:
        docs = layout.docs.chunked(mask.chunk)
        for position in range(layout.mesh.ring):
            for begin, end in layout.positions[position]:
                index = max(0, bisect_right(docs.starts, begin) - 1)
                while index < len(docs.starts) and docs.starts[index] < end:
                    start, size = docs.starts[index], docs.lengths[index]
                    first, last = max(begin, start), min(end, start + size)
                    if first < last:
                        out[position] += layers * mask.band.area(first - start, last - start, size)
                    index += 1
    return out


@settings(max_examples=40)
@given(case=long_lengths(32768), load=st.sampled_from(LOADS))
def test_balance_of_all_masks_and_of_several(case: tuple[int, list[int]], load: tuple[list, float]) -> None:
    ring, lengths = case
    layout = Layout(Documents(lengths), MeshShape(1, ring), "balanced", load[0])
    assert_every_token_once(layout)
    found = costs(layout)
    assert max(found) / (sum(found) / ring) <= load[1]


@settings(max_examples=40)
@given(
    case=long_lengths(8192),
    mask=st.builds(
        lambda width: Mask(window=(width, 0)), st.one_of(st.sampled_from([511, 1023, 4095]), st.integers(0, 9000))
    ),
)
def test_balance_of_windows_at_8192_tokens_a_rank(case: tuple[int, list[int]], mask: Mask) -> None:
    """The first tokens of a document, which see less than the window, are a good part of what a rank has."""
    ring, lengths = case
    layout = Layout(Documents(lengths), MeshShape(1, ring), "balanced", mask)
    assert_every_token_once(layout)
    found = costs(layout)
    assert max(found) / (sum(found) / ring) <= 1.05


@pytest.mark.parametrize(
    ("ring", "size", "width"), [(2, 9000, 4095), (8, 11000, 4095), (4, 20000, 4095), (8, 13000, 4095)]
)
def test_cut_documents_under_a_window_are_balanced(ring: int, size: int, width: int) -> None:
    """Cut as if all their tokens cost the same they were 1.14 to 1.24 of the mean."""
    lengths = [size] * (ring * 8192 // size)
    layout = Layout(
        Documents([*lengths, ring * 8192 - sum(lengths)]), MeshShape(1, ring), "balanced", Mask(window=(width, 0))
    )
    found = costs(layout)
    assert max(found) / (sum(found) / ring) <= 1.02


@given(
    size=st.integers(2, 4000),
    windows=st.lists(st.tuples(st.integers(0, 5000), st.sampled_from([1, 2, 5])), min_size=1, max_size=3),
    data=st.data(),
)
def test_nested_shares_under_windows_cost_what_their_tokens_do(
    size: int, windows: list[tuple[int, int]], data: st.DataObject
) -> None:
    load = Load(tuple((Mask(window=(width, 0)), float(layers)) for width, layers in windows))
    cuts = sorted(data.draw(st.sets(st.integers(1, size - 1), min_size=1, max_size=4)))
    owners = [(number, stop - start) for number, (start, stop) in enumerate(itertools.pairwise([0, *cuts, size]))]
    tile = data.draw(st.sampled_from([1, 16]))
    pieces = nested_by_cost(size, owners, tile, load.pairs_before)
    assert sorted(token for _, first, last in pieces for token in range(first, last)) == list(range(size))

    def pairs(first: int, last: int) -> float:
        return sum(layers * mask.band.area(first, last, size) for mask, layers in load.masks)

    mean, dearest = pairs(0, size) / size, pairs(size - 1, size)
    for number, tokens in owners:
        own = [(first, last) for position, first, last in pieces if position == number]
        assert sum(last - first for first, last in own) == tokens
        # Of every share one head is rounded, and what all before took too much is left to the innermost.
        error = abs(sum(pairs(*span) for span in own) - tokens * mean)
        assert error <= tile * dearest * len(owners)


@settings(max_examples=25)
@given(case=long_lengths(32768), load=st.sampled_from(LOADS))
def test_balance_of_kernel_time(case: tuple[int, list[int]], load: tuple[list, float]) -> None:
    """A token costs its part of what the machine takes for its document, over all layers; for its chunk, where these
    are what all layers see: a short last chunk is cheaper than the others."""
    ring, lengths = case
    machine = SHIPPED["H200"]
    layout = Layout(Documents(lengths), MeshShape(1, ring), "balanced", load[0], machine=machine)
    assert_every_token_once(layout)
    chunk = layout.parts[0].load.chunk
    lengths = list(Documents(lengths).chunked(chunk).lengths)
    sizes, kind = np.unique(lengths, return_inverse=True)
    seconds = np.zeros(len(sizes))
    for mask, layers in load[0]:
        parts = [Documents([size]).chunked(mask.chunk).lengths for size in sizes.tolist()]
        calls = [Call(tuple(Block((0, n), (0, n)) for n in lengths), *sides(mask)) for lengths in parts]
        table = BlockTable.of(calls)
        for backward in (False, True):
            seconds += layers * sum_by(table.call, machine.rate(128, backward).share_seconds(table, 256), len(sizes))
    whole = KeyDemand.of(PieceTable.of(layout.parts[0], Mask(chunk=chunk)), Mask().band)
    times = sum_by(whole.position, (seconds / sizes)[kind[whole.document]] * (whole.last - whole.first), ring)
    assert times.max() / times.mean() <= 1.02


def sides(mask: Mask) -> tuple[int, int]:
    """The band of whole documents as a call's `left` and `right`."""
    return (-1 if mask.band.lo is None else -mask.band.lo), (-1 if mask.band.hi is None else mask.band.hi)


def short_documents() -> Documents:
    """A kernel takes a tile of 128 rows for a document of 20 tokens, whatever the pairs."""
    return Documents([20] * 1000 + [128] * 260 + [1024] * 20)


def test_short_documents_are_balanced_by_time() -> None:
    docs, machine = short_documents(), SHIPPED["H200"]
    rates = [machine.rate(128, backward) for backward in (False, True)]

    def spread(layout: Layout) -> float:
        demand = KeyDemand.of(PieceTable.of(layout.parts[0], Mask()), Mask().band)
        times = sum_by(demand.position, sum(rate.share_seconds(demand.gathered_blocks, 256) for rate in rates), 4)
        return float(times.max() / times.mean())

    by_area = spread(Layout(docs, MeshShape(1, 4), "balanced"))
    by_time = spread(Layout(docs, MeshShape(1, 4), "balanced", machine=machine))
    assert by_time < 1.02
    assert by_area > 1.5


def test_what_documents_under_a_window_are_off_adds_up() -> None:
    """Each was little by itself, and the position whose documents begin elsewhere had 2.2 % too much."""
    docs = Documents([30000, 50000, 9000, 70000, 131072])
    found = costs(Layout(docs, MeshShape(1, 2), "balanced", Mask(window=(4095, 0))))
    assert max(found) / (sum(found) / 2) <= 1.016


@settings(max_examples=30)
@given(case=long_lengths(32768), data=st.data())
def test_unequal_speeds_get_unequal_shares(case: tuple[int, list[int]], data: st.DataObject) -> None:
    ring, lengths = case
    speeds = data.draw(st.lists(st.floats(0.7, 1.3), min_size=ring, max_size=ring))
    layout = Layout(Documents(lengths), MeshShape(1, ring), "balanced", speeds=speeds)
    assert_every_token_once(layout)
    times = [cost / speed for cost, speed in zip(costs(layout), speeds, strict=True)]
    assert max(times) / (sum(costs(layout)) / sum(speeds)) <= 1.03
    for size, speed in zip(layout.position_sizes, speeds, strict=True):
        assert abs(size / layout.docs.total - speed / sum(speeds)) <= 256 / 32768 / ring


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mask": []}, "mask must be a Mask, or pairs .* got none"),
        ({"mask": [Mask()]}, "mask must be a Mask, or pairs"),
        ({"mask": [(Mask(), 0)]}, "mask must be a Mask, or pairs"),
        ({"speeds": [1.0]}, r"speeds must be 2 positive numbers, .* got \[1.0\]"),
        ({"speeds": [1.0, 0.0]}, "speeds must be 2 positive numbers"),
        ({"speeds": [1.0, 2.0], "policy": "zigzag"}, 'speeds belongs to policy="balanced", got policy="zigzag"'),
    ],
)
def test_wrong_loads_are_refused(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Layout(Documents([10, 20]), MeshShape(1, 2), **arguments)


@pytest.mark.parametrize("ring", [8, 64])
def test_packs_of_the_published_histogram(ring: int) -> None:
    """A sample of benchmarks/balance.py, which takes 100 packs."""
    for seed in range(3):
        lengths = HISTOGRAMS["chatqa"].pack(ring * 32768, seed, longest=ring * 8192)
        found = balance(lengths, ring, "balanced")
        assert found.area <= 1.02
        assert found.tokens <= 1.01
        assert found.received <= 0.20


def test_the_automatic_layout_balances_the_time_of_the_meshs_machine() -> None:
    docs, machine = short_documents(), SHIPPED["H200"]
    by_area, by_time = (Layout(docs, MeshShape(1, 4), "balanced", machine=given).positions for given in (None, machine))
    assert by_area != by_time
    assert Layout(docs, MeshShape(1, 4)).positions == by_area
    assert Layout(docs, MeshShape(1, 4, machine=machine)).positions == by_time
    assert Layout(docs, MeshShape(1, 4, machine=machine), "balanced").positions == by_area
