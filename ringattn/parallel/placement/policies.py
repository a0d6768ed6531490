"""Which ring position holds which tokens: the three placements, as pure functions of integers.

A placement is, per ring position, its ordered ranges `(start, stop)` of global indices. Inside a position whole
documents come first, then head pieces (a head that opens its document before the others, since it needs no remote
key), then tail pieces, then padding: so every kernel call reads and writes one contiguous run of rows.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import accumulate, chain, pairwise
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from ringattn.documents import Documents
from ringattn.kept import kept
from ringattn.kernels.spec import Range
from ringattn.parallel.geometry.block_table import Floats
from ringattn.parallel.geometry.ranges import touching
from ringattn.parallel.placement.arcs import arcs
from ringattn.parallel.placement.cuts import Cut, Owner, consecutive, nested, nested_by_cost
from ringattn.parallel.placement.linear_parts import LinearPart, document_costs, linear_parts, runs_costs
from ringattn.parallel.placement.load import Load

Positions = tuple[tuple[Range, ...], ...]

TILE = 128  # rows of a kernel tile: cuts are rounded to it
# Of what a position costs, by how much a cut in few pieces may be off: of a document under a window, whose first tokens
# and those who see less ahead cost less than the others, and of one with segments or blocks.
SLACK = 0.015
MIN_TILES = 64  # a share of the tokens is at least this many roundings, so small inputs use a finer one


class Span(NamedTuple):
    """A run of tokens whose cost is balanced as one: a document as attention sees it, or padding (no cost)."""

    start: int
    size: int
    cost: float
    density: float  # cost per token
    nested: bool  # cut in nested heads and tails; else in consecutive runs
    document: int | None = None  # whose cost per token neither grows evenly nor is that of a window
    plain: bool = True  # without segments and blocks


Shares = list[tuple[Span, int, int]]  # pieces of one position: tokens `[first, last)` of a span


def contiguous(docs: Documents, load: Load, ring: int) -> Positions:
    """Equal runs of the stream: position i holds tokens `[i T / ring, (i + 1) T / ring)`."""
    bounds = [index * docs.total // ring for index in range(ring + 1)]
    spans = _spans(docs, load)
    starts = [span.start for span in spans]
    held: list[Shares] = [[] for _ in range(ring)]
    for position, (begin, end) in enumerate(pairwise(bounds)):
        index = max(0, bisect_right(starts, begin) - 1)
        while index < len(spans) and spans[index].start < end:
            span = spans[index]
            first, last = max(begin, span.start) - span.start, min(end, span.start + span.size) - span.start
            if first < last:
                held[position].append((span, first, last))
            index += 1
    return _ordered(held)


def zigzag(docs: Documents, load: Load, ring: int) -> Positions:
    """Every document in 2 × ring near-equal slices, slice i and its mirror together (any length is allowed).

    Source: zhuzilin/ring-flash-attention, Megatron-LM; there documents must divide by 2 × ring. The positions rotate
    from document to document so that the rows left over by the division do not always fall on the same one.
    """
    held: list[Shares] = [[] for _ in range(ring)]
    for number, span in enumerate(_spans(docs, load)):
        bounds = [index * span.size // (2 * ring) for index in range(2 * ring + 1)]
        for index, (first, last) in enumerate(pairwise(bounds)):
            if first < last:
                held[(min(index, 2 * ring - 1 - index) + number) % ring].append((span, first, last))
    return _ordered(held)


def balanced(docs: Documents, load: Load, ring: int, speeds: Sequence[float] | None = None) -> Positions:
    """Equal tokens and equal cost with at most two cuts per position: nested heads and tails, found by a window search.

    Sort the documents by cost per token. A window of T/P consecutive tokens of that order moves from below the average
    cost to above it, so at one place it costs exactly the average: give it to a position, remove it, and the rest has
    the same average. Shares of one causal document are nested heads and tails, whose cost is proportional to their
    tokens whatever their sizes: the largest outermost, which minimises the keys that must move.
    Cuts are rounded to `TILE` rows, or finer in a document whose rows cost more than the average row: so a rounding
    never moves more cost than `TILE` average rows have.

    Arguments:
        speeds: of every position; tokens and cost are then in proportion to them.
    """
    spans = sorted(_spans(docs, load), key=lambda span: (span.density, span.start))
    mean = sum(span.cost for span in spans) / max(docs.total, 1)
    rounding = partial(_tiles, mean=mean, coarsest=min(TILE, max(1, docs.total // (ring * MIN_TILES))))
    tiles = rounding(spans)
    speeds = speeds or [1.0] * ring
    shares = _window_search(spans, list(accumulate(speeds)), tiles)
    allowed = SLACK * mean * docs.total / sum(speeds) * np.array(speeds)
    slack = allowed.copy()  # what is left of it: documents that are cut between the same positions add up

    held: list[Shares] = [[] for _ in range(ring)]
    for span, owners, tile in zip(spans, shares, tiles, strict=True):
        if len(owners) == 1:
            pieces = [(owners[0][0], 0, span.size)]
        elif span.document is not None:
            parts = cache(partial(linear_parts, docs, span.document, load))
            pieces = _few_pieces(docs, span, load, owners, tile, slack, parts)
            pieces = pieces or _dealt(span, owners, rounding, parts())
        else:
            missing = load.ramp(span.size) * span.cost
            most = np.zeros(ring)  # that each is off, if the cheaper tokens are another's
            for position, tokens in owners:
                most[position] = missing * tokens / span.size
            if missing <= min(allowed[position] for position, _ in owners) and (most <= slack).all():
                pieces = _cut(span, owners, tile)
                slack -= most
            elif load.looks_ahead:
                pieces = arcs(span.size, owners, tile, partial(load.pairs_of, size=span.size))
            else:
                pieces = nested_by_cost(span.size, owners, tile, load.pairs_before)
        for position, first, last in pieces:
            held[position].append((span, first, last))
    return _ordered(held)


def _cut(span: Span, owners: list[Owner], tile: int) -> list[Cut]:
    """A span of even cost among its owners."""
    return nested(span.size, owners, tile) if span.nested else consecutive(owners)


def _few_pieces(
    docs: Documents,
    span: Span,
    load: Load,
    owners: list[Owner],
    tile: int,
    slack: Floats,
    parts: Callable[[], list[LinearPart]],
) -> list[Cut]:
    """A document with segments or blocks in one or two pieces for each owner, the fewest with which no position is over
    its slack; else nothing. Images that follow each other evenly are as good as text.

    Arguments:
        slack: of every position, by how much it may still cost more than its tokens do on the mean; what it does is
            taken off.
        parts: of the document.
    """
    assert span.document is not None
    if span.plain:  # but for layers with chunks, by which runs are not priced
        return []
    for pieces in _simple_cuts(span, load, owners, tile, parts):
        excess = np.zeros(len(slack))
        for position, tokens in owners:
            excess[position] = -tokens * span.density
        costs = runs_costs(docs, span.document, [(first, last) for _, first, last in pieces], load)
        np.add.at(excess, [position for position, _, _ in pieces], costs)
        if (excess <= slack).all():
            slack -= excess
            return pieces
    return []


def _simple_cuts(
    span: Span, load: Load, owners: list[Owner], tile: int, parts: Callable[[], list[LinearPart]]
) -> Iterator[list[Cut]]:
    """Ways to cut a document in few pieces, those with the fewest first."""
    yield consecutive(owners)
    if load.nested(span.size):
        yield nested(span.size, owners, tile)
    ends = [0, *(part.stop - span.start for part in parts())]
    sums = [0.0, *accumulate(part.cost for part in parts())]
    yield nested_by_cost(span.size, owners, tile, lambda places: np.interp(places, ends, sums))


def _dealt(
    span: Span, owners: list[Owner], rounding: Callable[[list[Span]], list[int]], found: list[LinearPart]
) -> list[Cut]:
    """`_cut` of a document whose cost is uneven: the window search once more, over its parts."""
    parts = [Span(x.start, x.stop - x.start, x.cost, x.cost / (x.stop - x.start), x.sloped) for x in found]
    parts.sort(key=lambda part: (part.density, part.start))
    tiles = rounding(parts)
    shares = _window_search(parts, list(accumulate(float(tokens) for _, tokens in owners)), tiles)
    pieces = []
    for part, own, tile in zip(parts, shares, tiles, strict=True):
        shift = part.start - span.start
        for index, first, last in _cut(part, own, tile):
            pieces.append((owners[index][0], shift + first, shift + last))
    return pieces


def _spans(docs: Documents, load: Load) -> tuple[Span, ...]:
    """Documents as attention sees them (chunks are documents of their own) and padding, in stream order, none empty.

    Kept with the documents, which are placed on several meshes where the degrees are open.
    """
    return kept(docs, ("spans", load), lambda: tuple(sorted(_spans_of(docs, load), key=attrgetter("start"))))


def _spans_of(docs: Documents, load: Load) -> list[Span]:
    parts = docs.chunked(load.chunk)
    spans = [Span(start, stop - start, 0.0, 0.0, False) for start, stop in docs.padding]
    costs = load.costs(np.array(parts.lengths, dtype=np.int64)).tolist()
    for number, (start, size, cost) in enumerate(zip(parts.starts, parts.lengths, costs, strict=True)):
        if size:
            spans.append(Span(start, size, cost, cost / size, load.nested(size), number if load.bent else None))
    return _with_segments(docs, load, spans) if docs.segmented else spans


def _with_segments(docs: Documents, load: Load, spans: list[Span]) -> list[Span]:
    """The spans with the true cost of documents that have segments or blocks."""
    numbers = [number for number, size in enumerate(docs.lengths) if size and not docs.is_plain(number)]
    costs = document_costs(docs, numbers, load).tolist()
    own = {
        docs.starts[number]: Span(docs.starts[number], size, cost, cost / size, True, number, False)
        for number, cost in zip(numbers, costs, strict=True)
        for size in (docs.lengths[number],)
    }
    return [own.get(span.start, span) for span in spans]


def _tiles(spans: list[Span], mean: float, coarsest: int) -> list[int]:
    """Rows that cuts of each span are rounded to, a power of two.

    Arguments:
        mean: cost of a token of the stream.
        coarsest: of spans that cost no more.
    """
    density = np.array([span.density or mean or 1.0 for span in spans])
    rows = np.maximum(1.0, coarsest * np.minimum(1.0, mean / density))
    return (1 << (np.frexp(rows)[1] - 1)).tolist()


def _window_search(spans: list[Span], bounds: list[float], tiles: list[int]) -> list[list[tuple[int, int]]]:
    """Tokens of every span given to every position: per span, sorted by density, a list of `(position, tokens)`.

    Arguments:
        bounds: what all positions up to each shall have, of the last of them.
    """
    left = np.array([span.size for span in spans], dtype=np.int64)
    density = np.array([span.density for span in spans])
    tokens, cost = int(left.sum()), float((left * density).sum())
    shares: list[list[tuple[int, int]]] = [[] for _ in spans]
    given, given_cost = 0, 0.0
    for position, bound in enumerate(bounds):
        # What all positions so far shall have, less what they got: a rounding is made up for by the next position.
        want = int(bound * tokens // bounds[-1]) - given
        goal = bound * cost / bounds[-1] - given_cost
        taken = left if position == len(bounds) - 1 else _window(left, density, want, goal, tiles)
        owned = np.flatnonzero(taken)
        for index, share in zip(owned.tolist(), taken[owned].tolist(), strict=True):
            shares[index].append((position, share))
        left = left - taken
        given += int(taken.sum())
        given_cost += float((taken * density).sum())
    return shares


def _window(left: np.ndarray, density: np.ndarray, want: int, goal: float, tiles: list[int]) -> np.ndarray:
    """Tokens that a window of `want` tokens and cost `goal` takes from every span; `left` are those not given away."""
    if want <= 0:
        return np.zeros_like(left)
    ends = np.cumsum(left)
    begins = ends - left
    costs = np.concatenate([[0.0], np.cumsum(left * density)])

    def cost_before(token: int) -> float:
        # `item`: this is called 40 times a position, and numbers of Python are faster than those of numpy.
        index = int(ends.searchsorted(token))
        return costs.item(index) + (token - begins.item(index)) * density.item(index) if token else 0.0

    low, high = 0, int(ends[-1]) - want
    while low < high:
        middle = (low + high) // 2
        if cost_before(middle + want) - cost_before(middle) < goal:
            low = middle + 1
        else:
            high = middle
    return _rounded_window(left, ends, low, want, tiles)


def _rounded_window(left: np.ndarray, ends: np.ndarray, start: int, want: int, tiles: list[int]) -> np.ndarray:
    """The window `[start, start + want)` with what it takes from a cut span rounded to tiles.

    The end of the expensive rows is rounded first, and the other end makes up for the tokens.
    """
    first = int(np.searchsorted(ends, start, side="right"))
    last = int(np.searchsorted(ends, start + want, side="left"))
    taken = np.zeros_like(left)
    if first < last:
        taken[last] = _rounded(start + want - int(ends[last - 1]), int(left[last]), tiles[last])
        taken[first + 1 : last] = left[first + 1 : last]
        want -= int(taken.sum())
    taken[first] = _rounded(max(want, 0), int(left[first]), tiles[first])
    return taken


def _rounded(tokens: int, available: int, tile: int) -> int:
    """`tokens` to the nearest number of tiles, or all there is."""
    return min((tokens + tile // 2) // tile * tile, available) if tokens < available else available


def _ordered(held: list[Shares]) -> Positions:
    """Ranges of every position, by kind; joined where they touch."""
    placement = []
    for pieces in held:
        pieces = _joined(sorted(pieces, key=lambda piece: piece[0].start + piece[1]))
        # The first of two pieces of one document is its head; a piece that is alone counts as a tail.
        heads = {a[0].start + a[1] for a, b in pairwise(pieces) if a[0].start == b[0].start}
        # Pieces of one kind stand together, so that a kernel call over them is one run of rows.
        whole: list[Range] = []
        segmented: list[Range] = []  # side by side, since several calls see them
        opening_heads: list[Range] = []  # they need no remote key
        later_heads: list[Range] = []
        tails: list[Range] = []
        padding: list[Range] = []
        for span, first, last in pieces:
            begin = span.start + first
            if not span.cost:
                kind = padding
            elif not span.plain:
                kind = segmented
            elif last - first == span.size:
                kind = whole
            elif first == 0:
                kind = opening_heads
            else:
                kind = later_heads if begin in heads else tails
            kind.append((begin, span.start + last))
        placement.append(touching(chain(whole, segmented, opening_heads, later_heads, tails, padding)))
    return tuple(placement)


def _joined(pieces: Shares) -> Shares:
    """Neighbouring pieces of one span made one."""
    out: Shares = []
    for span, first, last in pieces:
        if out and out[-1][0].start == span.start and out[-1][2] == first:
            out[-1] = (span, out[-1][1], last)
        else:
            out.append((span, first, last))
    return out
