"""Segments of documents: trees whose branches share what is before them, and blocks of tokens that see each other.

A tree's tokens stand in the stream once, parents before children. Whoever follows it from the root to a token walks
along a *path*, on which positions count from 0; a token sees what lies on its own path before it.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Range = tuple[int, int]


class Segment(NamedTuple):
    """Tokens `[start, stop)` of the stream that follow on the last of segment `parent` (its number; -1: on nothing)."""

    start: int
    stop: int
    parent: int


class PathRun(NamedTuple):
    """Positions `[first, last)` of a path, whose tokens are those of the stream from `start` on."""

    first: int
    last: int
    start: int


@dataclass(frozen=True)
class Branch:
    """Segments that lie end to end in the stream and on one path: what a kernel can take as one causal document.

    Arguments:
        start, stop: its tokens of the stream.
        first: position of its first token.
        path: all that its last token sees, ascending; its own tokens are the last run.
        blocks: ascending ranges of its positions whose tokens see each other.
    """

    start: int
    stop: int
    first: int
    path: tuple[PathRun, ...]
    blocks: tuple[Range, ...] = ()

    @property
    def last(self) -> int:
        """The position after that of its last token."""
        return self.first + self.stop - self.start

    def tokens(self, first: int, last: int) -> Iterator[PathRun]:
        """The runs of positions `[first, last)` of the path, ascending."""
        for run in self.path:
            begin, end = max(first, run.first), min(last, run.last)
            if begin < end:
                yield PathRun(begin, end, run.start + begin - run.first)

    def blocks_in(self, first: int, last: int) -> Sequence[Range]:
        """Its blocks that have tokens at positions `[first, last)`."""
        begin = bisect_right(self.blocks, first, key=lambda block: block[1])
        end = bisect_right(self.blocks, last - 1, key=lambda block: block[0])
        return self.blocks[begin:end]


def branches_of(segments: Sequence[Segment], base: int, blocks: Sequence[Range]) -> list[Branch]:
    """The branches of one document.

    Arguments:
        segments: of the document, in the order of the stream; parents are numbers counted from `base`.
        blocks: of the document, ranges of the stream.
    """
    ends: list[int] = []  # of each segment, the position after its last
    owner: list[int] = []  # and the number of its branch
    found: list[tuple[int, int, int, tuple[PathRun, ...]]] = []
    for number, segment in enumerate(segments):
        parent = segment.parent - base if segment.parent >= 0 else -1
        size = segment.stop - segment.start
        first = ends[parent] if parent >= 0 else 0
        if found and parent == number - 1:
            start, _, begin, path = found[-1]
            grown = PathRun(path[-1].first, first + size, path[-1].start)
            found[-1] = start, segment.stop, begin, (*path[:-1], grown)
        else:
            before = () if parent < 0 else tuple(_cut(found[owner[parent]][3], first))
            own = PathRun(first, first + size, segment.start)
            found.append((segment.start, segment.stop, first, (*before, own)))
        ends.append(first + size)
        owner.append(len(found) - 1)
    out = []
    for start, stop, first, path in found:
        own_blocks = tuple((a - start + first, b - start + first) for a, b in blocks if start <= a < stop)
        out.append(Branch(start, stop, first, path, own_blocks))
    return out


def _cut(path: Iterable[PathRun], last: int) -> Iterator[PathRun]:
    """A path up to a position."""
    for run in path:
        if run.first < last:
            yield PathRun(run.first, min(run.last, last), run.start)


def tree_segments(lengths: Sequence[int], parents: Sequence[int]) -> tuple[list[int], list[Segment]]:
    """The lengths of the documents that a stream of segments has, and the segments of those that have several.

    Raises ValueError naming the argument for what `Documents.from_tree` does not take.
    """
    if len(lengths) != len(parents):
        raise ValueError(f"parents must have one entry for each of the {len(lengths)} lengths, got {len(parents)}")
    roots: list[int] = []  # of each segment
    has_children = {parent for parent in parents if parent >= 0}
    for number, (size, parent) in enumerate(zip(lengths, parents, strict=True)):
        if not -1 <= parent < number:
            raise ValueError(
                f"parents[{number}] must be -1, or the number of a segment before it (below {number}), got {parent}"
            )
        if size < 0 or (not size and (parent >= 0 or number in has_children)):
            raise ValueError(
                f"lengths[{number}] must be at least 1, or 0 for a root without children, got {size}: a segment of a "
                "tree has tokens"
            )
        root = number if parent < 0 else roots[parent]
        if parent >= 0 and root != max(roots):
            raise ValueError(
                f"parents[{number}] = {parent} belongs to the tree of root {root}, but root {max(roots)} began after "
                "it: the segments of a tree must follow one another in the stream"
            )
        roots.append(root)
    sizes = [0] * len(lengths)
    for size, root in zip(lengths, roots, strict=True):
        sizes[root] += size
    segments: list[Segment] = []
    number_of: dict[int, int] = {}
    start = 0
    for number, (size, parent) in enumerate(zip(lengths, parents, strict=True)):
        if parent >= 0 or number in has_children:
            number_of[number] = len(segments)
            segments.append(Segment(start, start + size, number_of[parent] if parent >= 0 else -1))
        start += size
    return [sizes[root] for root in dict.fromkeys(roots)], segments


def checked_segments(values: Iterable[Any], spans: Sequence[Range]) -> tuple[Segment, ...]:
    """Segments of documents, checked; documents of one segment are left out.

    Arguments:
        values: (start, stop, parent) of each, in the order of the stream.
        spans: ranges of the documents.

    Raises ValueError naming the argument.
    """
    found = tuple(Segment(*_whole_numbers(value, 3, f"segments[{number}]")) for number, value in enumerate(values))
    ends = dict(span for span in spans if span[0] < span[1])
    root, end = -1, 0  # of the document that is being read
    for number, segment in enumerate(found):
        told = f"segments[{number}] = {tuple(segment)}"
        if segment.parent < 0:
            if segment.start not in ends or segment.start < end:
                raise ValueError(f"{told} without a parent must begin a document, and after the one before it")
            root, end = number, ends[segment.start]
        elif not root <= segment.parent < number or segment.start != found[number - 1].stop:
            raise ValueError(f"{told} must follow the one before it, and on a parent before it in its document")
        if not segment.start < segment.stop <= end:
            raise ValueError(f"{told} must hold tokens, and lie in the document that ends at {end}")
        last = number + 1 == len(found) or found[number + 1].parent < 0
        if last and segment.stop != end:
            raise ValueError(f"{told} is the last of its document and must end with it, at {end}")
    return _with_several(found)


def _with_several(found: Sequence[Segment]) -> tuple[Segment, ...]:
    """Without the segments that are whole documents, which are none."""
    alone = [
        segment.parent < 0 and (number + 1 == len(found) or found[number + 1].parent < 0)
        for number, segment in enumerate(found)
    ]
    dropped = 0
    moved: list[int] = []
    for one in alone:
        moved.append(dropped)
        dropped += one
    return tuple(
        segment._replace(parent=segment.parent - moved[segment.parent]) if segment.parent >= 0 else segment
        for segment, one in zip(found, alone, strict=True)
        if not one
    )


def checked_blocks(values: Iterable[Any], spans: Sequence[Range], segments: Sequence[Segment]) -> tuple[Range, ...]:
    """Blocks of tokens that see each other, checked; those of one token are left out.

    Arguments:
        values: (start, stop) of each, ascending, in tokens of the stream.
        spans, segments: of the documents. A block lies in one document, and there in one segment.

    Raises ValueError naming the argument.
    """
    trees = {segment.start for segment in segments if segment.parent < 0}
    whole = [span for span in spans if span[0] < span[1] and span[0] not in trees]
    inside = sorted([*whole, *((segment.start, segment.stop) for segment in segments)])
    begins = [start for start, _ in inside]
    found, end = [], 0
    for number, value in enumerate(values):
        start, stop = _whole_numbers(value, 2, f"blocks[{number}]")
        if not end <= start <= stop:
            raise ValueError(
                f"blocks[{number}] must be (start, stop) that begins at or after the end of the one before it, {end}, "
                f"got ({start}, {stop})"
            )
        end = stop
        if stop - start < 2:
            continue
        at = bisect_right(begins, start) - 1
        if at < 0 or stop > inside[at][1]:
            raise ValueError(
                f"blocks[{number}] = ({start}, {stop}) must lie in one document, and in one segment of it: who sees a "
                "token of a block sees it whole"
            )
        found.append((start, stop))
    return tuple(found)


def dense_segments(
    start: int, size: int, segments: Sequence[Segment], base: int, blocks: Sequence[Range]
) -> tuple[Tensor, Tensor, Tensor]:
    """A document with segments or blocks by their definition, token by token, for tests and pictures.

    Arguments:
        start, size: of the document.
        segments: of the document; parents are numbers counted from `base`.
        blocks: of the document, ranges of the stream.

    Returns: (size, size) whether the key is on the path of the query's segment; (size,) positions; (size,) the number
    of each token's block, -1 outside of them.
    """
    positions = torch.arange(size, device="cpu")
    seen = torch.ones(size, size, dtype=torch.bool, device="cpu")
    for segment in segments:
        rows = slice(segment.start - start, segment.stop - start)
        seen[rows] = False
        seen[rows, rows] = True
        positions[rows] -= segment.start - start
        parent = segment.parent
        if parent >= 0:
            positions[rows] += positions[segments[parent - base].stop - start - 1] + 1
        while parent >= 0:
            above = segments[parent - base]
            seen[rows, above.start - start : above.stop - start] = True
            parent = above.parent
    block = torch.full((size,), -1, device="cpu")
    for index, (first, last) in enumerate(blocks):
        block[first - start : last - start] = index
    return seen, positions, block


def _whole_numbers(value: Any, count: int, name: str) -> tuple[int, ...]:
    try:
        found = tuple(int(number) for number in value)
        exact = len(found) == count and all(a == b for a, b in zip(found, value, strict=True))
    except (TypeError, ValueError):
        found, exact = (), False
    if not exact:
        raise ValueError(f"{name} must be {count} integers, got {value!r}")
    return found
