"""What ring positions need of one another where documents have segments: trees, and blocks of tokens.

All is counted in tokens of the stream, since a query sees a few runs of them and not one run of its document.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from ringattn.kept import kept
from ringattn.kernels.spec import Range
from ringattn.mask import Band, Mask
from ringattn.parallel.geometry.block_table import Ints
from ringattn.parallel.geometry.blocks import Piece
from ringattn.parallel.geometry.ranges import length, union
from ringattn.parallel.geometry.views import View, views_of
from ringattn.parallel.placement.placement import Placement
from ringattn.parallel.schedules.demand import RowTraffic
from ringattn.segments import Branch


@dataclass(frozen=True)
class Rows:
    """Where tokens of the stream stand in a tensor: pieces whose positions are those of the stream, ascending."""

    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, ranges: Iterable[Range]) -> "Rows":
        """Of a tensor that holds these tokens in this order."""
        ranges = list(ranges)
        rows = accumulate((stop - start for start, stop in ranges), initial=0)
        return cls(tuple(sorted(Piece(0, *span, row) for span, row in zip(ranges, rows, strict=False))))

    @cached_property
    def _ends(self) -> list[int]:
        return [piece.last for piece in self.pieces]

    def inside(self, start: int, stop: int) -> Iterator[Piece]:
        """Of the tokens `[start, stop)` those that are there, ascending."""
        for piece in self.pieces[bisect_right(self._ends, start) :]:
            if piece.first >= stop:
                break
            first, last = max(start, piece.first), min(stop, piece.last)
            yield Piece(0, first, last, piece.row + first - piece.first)

    def on_path(self, branch: Branch, number: int, keys: Range) -> list[Piece]:
        """The keys at these positions of a branch's path that are there, as pieces of the path."""
        return [
            Piece(number, run.first + piece.first - run.start, run.first + piece.last - run.start, piece.row)
            for run in branch.tokens(*keys)
            for piece in self.inside(run.start, run.start + run.last - run.first)
        ]


@dataclass(frozen=True)
class Group:
    """Queries of one branch that stand side by side at a position, and all that they see.

    Arguments:
        number: of the branch.
        views: of all of the queries first, then of those in blocks.
    """

    branch: Branch
    number: int
    views: tuple[View, ...]

    @property
    def row(self) -> int:
        """Of the first query."""
        return self.views[0].query.row

    @cached_property
    def keys(self) -> Range:
        """Positions of the path that some query sees; there are none between them that no query does."""
        return min(view.keys[0] for view in self.views), max(view.keys[1] for view in self.views)

    @cached_property
    def tokens(self) -> list[Range]:
        """The same as ranges of the stream, in the order of the path."""
        return [(run.start, run.start + run.last - run.first) for run in self.branch.tokens(*self.keys)]


@dataclass(frozen=True)
class SegmentDemand(RowTraffic):
    """Every position's queries in groups, and the key rows that positions need of one another.

    Arguments:
        index: of every position, the global ranges of its rows.
    """

    branches: tuple[Branch, ...]
    mask: Mask
    index: tuple[tuple[Range, ...], ...]

    @classmethod
    def of(cls, placement: Placement, mask: Mask) -> "SegmentDemand":
        """Raises ValueError for a mask that segments do not go with."""
        placement.docs.check_mask(mask)
        return cls(placement.docs.branches, mask, placement.positions)

    @property
    def positions(self) -> int:  # type: ignore[override]
        return len(self.index)

    @property
    def band(self) -> Band:  # type: ignore[override]
        return self.mask.band

    @cached_property
    def rows(self) -> Ints:  # type: ignore[override]
        return np.array([length(ranges) for ranges in self.index], dtype=np.int64)

    @cached_property
    def held(self) -> tuple[Rows, ...]:
        """Where each position has its tokens."""
        return tuple(Rows.of(ranges) for ranges in self.index)

    def groups(self, position: int) -> tuple[Group, ...]:
        """The queries of a position, by row."""
        return kept(self, ("groups", position), lambda: tuple(self._groups(position)))

    def _groups(self, position: int) -> Iterator[Group]:
        row = 0
        for start, stop in self.index[position]:
            number = max(0, bisect_right(self._begins, start) - 1)
            while number < len(self.branches) and self.branches[number].start < stop:
                branch = self.branches[number]
                first, last = max(start, branch.start), min(stop, branch.stop)
                if first < last:
                    shift = branch.first - branch.start
                    query = Piece(number, first + shift, last + shift, row + first - start)
                    yield Group(branch, number, tuple(views_of(branch, query, self.mask)))
                number += 1
            row += stop - start

    @cached_property
    def _begins(self) -> list[int]:
        return [branch.start for branch in self.branches]

    @cached_property
    def needs(self) -> tuple[tuple[Range, ...], ...]:
        """Of every position the tokens that its queries see, ascending."""
        return tuple(
            tuple(union(span for group in self.groups(position) for span in group.tokens))
            for position in range(self.positions)
        )

    @cached_property
    def holders(self) -> tuple[list[Piece], list[int]]:
        """All pieces of all positions in the order of the stream, each with its position as `document`; their ends."""
        pieces = [piece._replace(document=at) for at, rows in enumerate(self.held) for piece in rows.pieces]
        pieces.sort(key=lambda piece: piece.first)
        return pieces, [piece.last for piece in pieces]

    def held_by(self, spans: Sequence[Range]) -> Iterator[Piece]:
        """Who has these tokens: pieces in the order of the spans, with the position as `document`."""
        pieces, ends = self.holders
        for start, stop in spans:
            for piece in pieces[bisect_right(ends, start) :]:
                if piece.first >= stop:
                    break
                first, last = max(start, piece.first), min(stop, piece.last)
                yield Piece(piece.document, first, last, piece.row + first - piece.first)

    def is_local(self, position: int, group: Group) -> bool:
        """Whether a position has all keys that a group sees."""
        found = sum(piece.last - piece.first for span in group.tokens for piece in self.held[position].inside(*span))
        return found == length(group.tokens)

    @cached_property
    def messages(self) -> dict[Range, list[Piece]]:
        """By (holder, reader): the pieces of the holder that the reader needs, ascending; none of its own."""
        found: dict[Range, list[Piece]] = defaultdict(list)
        for reader, spans in enumerate(self.needs):
            for piece in self.held_by(spans):
                if piece.document != reader:
                    found[piece.document, reader].append(piece)
        return found

    @cached_property
    def traffic(self) -> tuple[Ints, Ints, Ints]:
        rows = [
            (reader, holder, sum(piece.last - piece.first for piece in pieces))
            for (holder, reader), pieces in sorted(self.messages.items(), key=lambda item: item[0][::-1])
        ]
        reader, holder, count = np.array(rows, dtype=np.int64).reshape(-1, 3).T
        return reader, holder, count
