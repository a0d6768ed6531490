"""Keys that travel: a later stage under construction, what arrives for it and what leaves for the stages of others."""

from collections import defaultdict
from dataclasses import dataclass, field
from operator import itemgetter

from ringattn.kernels.spec import Block, Range
from ringattn.parallel.geometry.blocks import Piece, group_calls
from ringattn.parallel.geometry.ranges import overlap
from ringattn.parallel.plan.plan import Stage
from ringattn.parallel.plan.route import Message, Route

_Segments = dict[int, list[tuple[int, Range]]]  # by peer: the document, and its rows


@dataclass
class StageBuilder:
    """One later stage: a buffer's rows, where they come from, and what this position sends.

    Messages are in the order of documents, and inside of one in that of its tokens, whatever the order of buffers.
    """

    rows: int = 0
    index: list[Range] = field(default_factory=list)  # global
    copies: list[tuple[Range, Range]] = field(default_factory=list)
    repeats: list[tuple[Range, Range]] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    _arriving: _Segments = field(default_factory=lambda: defaultdict(list))
    _leaving: _Segments = field(default_factory=lambda: defaultdict(list))

    def room(self, index: Range) -> Range:
        """New rows of the buffer, for the tokens of a global range."""
        self.index.append(index)
        first = self.rows
        self.rows += index[1] - index[0]
        return first, self.rows

    def copy(self, rows: Range, target: Range) -> None:
        """Local rows; those of short documents that lie side by side move together."""
        if self.copies and (self.copies[-1][0][1], self.copies[-1][1][1]) == (rows[0], target[0]):
            before = self.copies.pop()
            rows, target = (before[0][0], rows[1]), (before[1][0], target[1])
        self.copies.append((rows, target))

    def arrive(self, holder: int, document: int, target: Range) -> None:
        self._arriving[holder].append((document, target))

    def leave(self, reader: int, wanted: Range, own: list[Piece]) -> None:
        """For `reader`, the positions of a document that it wants as far as they are here, in its pieces `own`."""
        for piece in own:
            first, last = overlap(wanted, (piece.first, piece.last))
            if first < last:
                shift = piece.row - piece.first
                self._leaving[reader].append((piece.document, (first + shift, last + shift)))

    @property
    def returned(self) -> list[Range]:
        """Local rows whose gradients come back."""
        copied = [rows for rows, _ in self.copies]
        return copied + [rows for segments in self._leaving.values() for _, rows in segments]

    def stage(self, shared_q: Range, cast: Route, back: Route) -> Stage:
        calls = group_calls(self.blocks, shared_q)
        sends, receives = _messages(self._leaving), _messages(self._arriving)
        assert [message.rows for message in sends] == [rows for rows in cast.sends if rows]
        assert [message.rows for message in receives] == [rows for rows in cast.receives if rows]
        index, copies, repeats = tuple(self.index), tuple(self.copies), tuple(self.repeats)
        return Stage(calls, self.rows, index, copies, repeats, sends, receives, cast, back)


def _messages(segments: _Segments) -> tuple[Message, ...]:
    return tuple(
        Message(peer, tuple(rows for _, rows in sorted(parts, key=itemgetter(0))))
        for peer, parts in sorted(segments.items())
        if parts
    )
