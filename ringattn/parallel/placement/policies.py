"""Which ring position holds which tokens: the three placements, as pure functions of integers.

A placement is, per ring position, its ordered ranges `(start, stop)` of global indices. Inside a position whole
documents come first, then head pieces (a head that opens its document before the others, since it needs no remote
key), then tail pieces, then padding: so every kernel call reads and writes one contiguous run of rows.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
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
from ringattn.parallel.placement.linear_parts import UnevenDocument, document_costs
from ringattn.parallel.placement.load import Load
from ringattn.parallel.placement.window_search import Span, rounded_rows, window_search

Positions = tuple[tuple[Range, ...], ...]

TILE = 128  # rows of a kernel tile: cuts are rounded to it
# Of what a position costs, by how much a cut in few pieces may be off: of a document under a window, whose first tokens
# and those who see less ahead cost less than the others, and of one with segments or blocks.
SLACK = 0.015
MIN_TILES = 64  # a share of the tokens is at least this many roundings, so small inputs use a finer one

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
    rounding = partial(rounded_rows, mean=mean, coarsest=min(TILE, max(1, docs.total // (ring * MIN_TILES))))
    tiles = rounding(spans)
    speeds = speeds or [1.0] * ring
    shares = window_search(spans, list(accumulate(speeds)), tiles)
    slack = Slack(SLACK * mean * docs.total / sum(speeds) * np.array(speeds))

    held: list[Shares] = [[] for _ in range(ring)]
    for span, owners, tile in zip(spans, shares, tiles, strict=True):
        shared = Shared(span, owners, tile)
        if len(owners) == 1:
            pieces = [(owners[0][0], 0, span.size)]
        elif span.document is None:
            pieces = _windowed(shared, load, slack)
        else:
            document = UnevenDocument(docs, span.document, load)
            pieces = _few_pieces(shared, document, slack) or _dealt(shared, document, rounding)
        for position, first, last in pieces:
            held[position].append((span, first, last))
    return _ordered(held)


class Shared(NamedTuple):
    """A span of which several positions have tokens, and the rows that its cuts are rounded to."""

    span: Span
    owners: list[Owner]
    tile: int

    def cut(self) -> list[Cut]:
        """As of even cost."""
        nest = self.span.nested
        return nested(self.span.size, self.owners, self.tile) if nest else consecutive(self.owners)


class Slack:
    """By how much positions may still cost more than their tokens do on the mean. Documents that are cut between the
    same positions add up: what one takes, the next one has not.

    Arguments:
        allowed: of every position, all documents together.
    """

    def __init__(self, allowed: Floats) -> None:
        self.allowed, self.left = allowed, allowed.copy()

    def admits(self, excess: Floats) -> bool:
        """Whether every position has that much left; it is then taken."""
        fits = bool((excess <= self.left).all())
        if fits:
            self.left -= excess
        return fits


def _windowed(shared: Shared, load: Load, slack: Slack) -> list[Cut]:
    """A document whose tokens cost the same, or evenly more, but for the first and last ones under a window."""
    span, owners, tile = shared
    missing = load.ramp(span.size) * span.cost
    most = np.zeros(len(slack.left))  # that each is off, if the cheaper tokens are another's
    for position, tokens in owners:
        most[position] = missing * tokens / span.size
    if missing <= min(slack.allowed[position] for position, _ in owners) and slack.admits(most):
        return shared.cut()
    if load.looks_ahead:
        return arcs(span.size, owners, tile, partial(load.pairs_of, size=span.size))
    return nested_by_cost(span.size, owners, tile, load.pairs_before)


def _few_pieces(shared: Shared, document: UnevenDocument, slack: Slack) -> list[Cut]:
    """A document with segments or blocks in one or two pieces for each owner, the fewest with which no position is over
    its slack; else nothing. Images that follow each other evenly are as good as text.
    """
    if shared.span.plain:  # but for layers with chunks, by which runs are not priced
        return []
    for pieces in _simple_cuts(shared, document):
        excess = np.zeros(len(slack.left))
        for position, tokens in shared.owners:
            excess[position] = -tokens * shared.span.density
        costs = document.costs([(first, last) for _, first, last in pieces])
        np.add.at(excess, [position for position, _, _ in pieces], costs)
        if slack.admits(excess):
            return pieces
    return []


def _simple_cuts(shared: Shared, document: UnevenDocument) -> Iterator[list[Cut]]:
    """Ways to cut a document in few pieces, those with the fewest first."""
    span, owners, tile = shared
    yield consecutive(owners)
    if document.load.nested(span.size):
        yield nested(span.size, owners, tile)
    yield nested_by_cost(span.size, owners, tile, document.before)


def _dealt(shared: Shared, document: UnevenDocument, rounding: Callable[[list[Span]], list[int]]) -> list[Cut]:
    """`Shared.cut` of a document whose cost is uneven: the window search once more, over its parts."""
    owners = shared.owners
    parts = [Span(x.start, x.stop - x.start, x.cost, x.cost / (x.stop - x.start), x.sloped) for x in document.parts]
    parts.sort(key=lambda part: (part.density, part.start))
    tiles = rounding(parts)
    shares = window_search(parts, list(accumulate(float(tokens) for _, tokens in owners)), tiles)
    pieces = []
    for part in map(Shared, parts, shares, tiles):
        shift = part.span.start - shared.span.start
        for index, first, last in part.cut():
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
