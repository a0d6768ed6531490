"""Document boundaries of a packed token stream: host-side integers, the only truth about who may attend to whom."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from ringattn.boundaries import (
    block_ids_of_types,
    blocks_of_ids,
    lengths_of_cu_seqlens,
    lengths_of_position_ids,
    spans_of_padding_mask,
    spans_of_segment_ids,
)
from ringattn.integers import IntegerLike, integers, rows_of
from ringattn.mask import Mask
from ringattn.segments import (
    Branch,
    Range,
    Segment,
    branches_of,
    checked_blocks,
    checked_segments,
    dense_segments,
    tree_segments,
)


@dataclass(frozen=True, init=False)
class Documents:
    """Documents laid end to end in a stream of `total` tokens; tokens of no document are padding.

    Arguments:
        lengths: tokens of each document, >= 0, in stream order.
        starts: global index of each document's first token; default: end to end from 0.
        total: tokens of the stream, padding included; default: the end of the last document.
        blocks: ranges `(start, stop)` of the stream, ascending, each in one document: the tokens of a block (an image,
            a prefix) see each other, and what a causal mask leaves of the rest.
        segments: `(start, stop, parent)` of the segments of documents that are trees, see `from_tree`.

    Raises ValueError naming the argument for negative lengths, overlapping documents, a total that is too small, or
    blocks and segments that do not fit the documents.
    """

    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    total: int
    blocks: tuple[Range, ...]
    segments: tuple[Segment, ...]

    def __init__(
        self,
        lengths: IntegerLike,
        starts: IntegerLike | None = None,
        total: int | None = None,
        blocks: Iterable[Sequence[int]] = (),
        segments: Iterable[Sequence[int]] = (),
    ) -> None:
        sizes = integers(lengths, "lengths")
        for index, size in enumerate(sizes):
            if size < 0:
                raise ValueError(f"lengths must be >= 0, got lengths[{index}] = {size}")
        ends = list(accumulate(sizes))
        begins = tuple(end - size for end, size in zip(ends, sizes, strict=True))
        if starts is not None:
            begins = integers(starts, "starts")
            if len(begins) != len(sizes):
                raise ValueError(f"starts must have one entry per document: {len(sizes)} lengths, {len(begins)} starts")
        last = 0
        for index, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
            if begin < last:
                raise ValueError(f"starts[{index}] = {begin} lies before the end {last} of what comes before it")
            last = begin + size
        if total is not None and (not isinstance(total, int) or isinstance(total, bool) or total < last):
            raise ValueError(f"total must be an integer >= {last}, the end of the last document, got {total!r}")
        object.__setattr__(self, "lengths", sizes)
        object.__setattr__(self, "starts", begins)
        object.__setattr__(self, "total", last if total is None else total)
        blocks, segments = list(blocks), list(segments)
        spans = [(begin, begin + size) for begin, size in zip(begins, sizes, strict=True)] if blocks or segments else []
        object.__setattr__(self, "segments", checked_segments(segments, spans))
        object.__setattr__(self, "blocks", checked_blocks(blocks, spans, self.segments))

    @classmethod
    def from_tree(
        cls,
        lengths: IntegerLike,
        parents: IntegerLike,
        blocks: Iterable[Sequence[int]] = (),
        total: int | None = None,
    ) -> "Documents":
        """From segments that share what is before them: several completions of one prompt, or a tree of turns.

        Arguments:
            lengths: tokens of each segment, in the order of the stream.
            parents: for each the number of the segment that it follows on, which stands before it, or -1 for a root.
                A root and all that follow on it are one document, and stand together in the stream; a plain document
                is a root that nothing follows on.
            blocks, total: as for `Documents`. A block lies in one segment.

        A token sees the segments before it on the way from its root, and of its own what is before it. Its position is
        counted on that way: every child of a segment begins with the same one. Raises ValueError naming the argument.
        """
        sizes, above = integers(lengths, "lengths"), integers(parents, "parents")
        documents, segments = tree_segments(sizes, above)
        return cls(documents, total=total, blocks=blocks, segments=segments)

    @classmethod
    def from_block_ids(cls, block_ids: IntegerLike, docs: "Documents | None" = None) -> "Documents":
        """From an id per token, negative outside of blocks: each run of equal ids in a document is a block.

        Arguments:
            block_ids: (T,), or (B, T) whose rows are laid end to end.
            docs: the documents of the stream; default: each row is one.

        An id that comes back in its document after another one raises ValueError: such tokens would see each other,
        and are no block of consecutive tokens.
        """
        rows = rows_of(block_ids, "block_ids")
        if docs is None:
            docs = cls([len(row) for row in rows])
        ids = [number for row in rows for number in row]
        if len(ids) != docs.total:
            raise ValueError(f"block_ids must hold one id for each of the {docs.total} tokens, got {len(ids)}")
        return cls(docs.lengths, docs.starts, docs.total, blocks_of_ids(ids, docs.spans), docs.segments)

    @classmethod
    def from_token_type_ids(
        cls, token_type_ids: IntegerLike, docs: "Documents | None" = None, types: Sequence[int] = (1,)
    ) -> "Documents":
        """From a type per token, as processors of transformers give: each run of tokens of `types` is a block.

        Arguments:
            token_type_ids: (T,), or (B, T) whose rows are laid end to end.
            docs: the documents of the stream; default: each row is one.
            types: of the tokens that see each other; runs of them are one block, whatever the types in it.
        """
        rows = rows_of(token_type_ids, "token_type_ids")
        ids = block_ids_of_types(rows, types)
        return cls.from_block_ids(ids, cls([len(row) for row in rows]) if docs is None else docs)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: IntegerLike, total: int | None = None) -> "Documents":
        """From cumulative lengths `[0, l0, l0 + l1, ...]`; tokens between the last entry and `total` are padding."""
        return cls(lengths_of_cu_seqlens(cu_seqlens), total=total)

    @classmethod
    def from_position_ids(cls, position_ids: IntegerLike, first: int = 0) -> "Documents":
        """From the positions of the whole, unsharded stream: every document counts from `first` by ones.

        Accepts (T,) or (1, T); `first` is the position of a document's first token (2 for RoBERTa). Raises ValueError
        for anything else, since a guess here would let documents mix: a stream that starts inside a document (a shard),
        a jump inside one, a restart at another value, several axes (M-RoPE) or rows.
        """
        return cls(lengths_of_position_ids(position_ids, first))

    @classmethod
    def from_segment_ids(cls, segment_ids: IntegerLike) -> "Documents":
        """From an id per token: each run of equal ids is a document, negative ids are padding.

        Accepts (T,), or (B, T) whose rows are laid end to end and never join. An id that comes back in the same row
        after another one raises ValueError: such tokens could not be one document of consecutive tokens.
        """
        return cls(*spans_of_segment_ids(segment_ids))

    @classmethod
    def from_padding_mask(cls, attention_mask: IntegerLike) -> "Documents":
        """From a (B, S) or (S,) mask with 1 for tokens and 0 for padding on the left, the right or both sides.

        Rows are laid end to end, one document each. A hole inside a row raises ValueError: packed rows need
        `from_segment_ids`.
        """
        return cls(*spans_of_padding_mask(attention_mask))

    @cached_property
    def cu_seqlens(self) -> tuple[int, ...]:
        """Cumulative lengths, `len(lengths) + 1` entries. Raises ValueError if padding lies before a document."""
        for index, (start, end) in enumerate(zip(self.starts, accumulate(self.lengths, initial=0), strict=False)):
            if start != end:
                raise ValueError(
                    f"cu_seqlens cannot describe padding before document {index} (tokens {end} to {start}); "
                    "use starts and lengths"
                )
        return (0, *accumulate(self.lengths))

    @property
    def spans(self) -> list[Range]:
        """The range `(start, stop)` of the stream of each document."""
        return [(start, start + size) for start, size in zip(self.starts, self.lengths, strict=True)]

    @cached_property
    def padding(self) -> tuple[tuple[int, int], ...]:
        """Global ranges `(start, stop)` of the tokens of no document."""
        gaps = zip([0, *(stop for _, stop in self.spans)], [*self.starts, self.total], strict=True)
        return tuple((a, b) for a, b in gaps if b > a)

    def chunked(self, chunk: int | None) -> "Documents":
        """The same stream with every document cut in sub-documents of `chunk` tokens (the last may be shorter)."""
        if chunk is None:
            return self
        if chunk < 1:
            raise ValueError(f"chunk must be None or an integer >= 1, got {chunk}")
        self.check_mask(Mask(chunk=chunk))
        spans = [
            (start + offset, min(chunk, size - offset))
            for start, size in zip(self.starts, self.lengths, strict=True)
            for offset in range(0, size, chunk)
        ]
        return Documents([size for _, size in spans], [start for start, _ in spans], self.total)

    @property
    def segmented(self) -> bool:
        """Whether some documents are trees, or have blocks of tokens that see each other."""
        return bool(self.segments or self.blocks)

    def check_mask(self, mask: Mask) -> None:
        """Raises ValueError for a mask that is not defined on documents with segments or blocks."""
        if self.segmented and (mask.chunk is not None or not mask.causal):
            raise ValueError(
                f"mask must be causal and without a chunk for documents with segments or blocks, got {mask} for {self}"
            )

    @cached_property
    def branches(self) -> tuple[Branch, ...]:
        """What kernels can take as causal documents, in the order of the stream: a plain document is one branch."""
        return tuple(branch for number in range(len(self)) for branch in self.branches_of(number))

    def branches_of(self, number: int) -> list[Branch]:
        """Those of one document; none of an empty one."""
        start, size = self.starts[number], self.lengths[number]
        base, segments = self._segments_of(number)
        if not segments:
            base, segments = 0, (Segment(start, start + size, -1),) if size else ()
        return branches_of(segments, base, self._blocks_of(number))

    def _segments_of(self, number: int) -> tuple[int, tuple[Segment, ...]]:
        """The segments of a document, none of a plain one, and the number of the first."""
        first, last = (
            bisect_left(self.segments, bound, key=lambda segment: segment.start)
            for bound in (self.starts[number], self.starts[number] + self.lengths[number])
        )
        return first, self.segments[first:last]

    def _blocks_of(self, number: int) -> tuple[Range, ...]:
        first, last = (
            bisect_left(self.blocks, bound, key=lambda block: block[0])
            for bound in (self.starts[number], self.starts[number] + self.lengths[number])
        )
        return self.blocks[first:last]

    def is_plain(self, number: int) -> bool:
        """Whether a document has neither segments nor blocks."""
        return not self._segments_of(number)[1] and not self._blocks_of(number)

    def select(self, numbers: Sequence[int], starts: Sequence[int], total: int) -> "Documents":
        """Some of the documents, moved to new places: with these `starts` in a stream of `total` tokens."""
        lengths = [self.lengths[number] for number in numbers]
        if not self.segmented:
            return Documents(lengths, starts, total)
        blocks: list[Range] = []
        segments: list[Segment] = []
        for number, start in zip(numbers, starts, strict=True):
            shift = start - self.starts[number]
            base, own = self._segments_of(number)
            base -= len(segments)
            for segment in own:
                parent = segment.parent - base if segment.parent >= 0 else -1
                moved = segment.start + shift, segment.stop + shift
                segments.append(Segment(*moved, parent))
            blocks += [(first + shift, last + shift) for first, last in self._blocks_of(number)]
        return Documents(lengths, starts, total, blocks, segments)

    @cached_property
    def position_runs(self) -> tuple[tuple[int, int, int], ...]:
        """`(start, stop, first)`: ranges that make up the stream, in which positions count by ones from `first`.

        Padding counts from 0 in every run.
        """
        if self.segments:
            runs = [(branch.start, branch.stop, branch.first) for branch in self.branches]
        else:
            runs = [(start, stop, 0) for start, stop in self.spans if stop > start]
        return tuple(sorted([*runs, *((start, stop, 0) for start, stop in self.padding)]))

    def position_ids(self) -> torch.Tensor:
        """Position of each token in its document, of a tree on its path: (total,) int64 on the host."""
        parts = [torch.arange(first, first + stop - start, device="cpu") for start, stop, first in self.position_runs]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device="cpu")

    def dense(self, mask: Mask | None = None) -> torch.Tensor:
        """Brute force: the (total, total) boolean matrix [query, key] under `mask` (None: all pairs of a document)."""
        allowed = torch.zeros(self.total, self.total, dtype=torch.bool, device="cpu")
        for number, (start, size) in enumerate(zip(self.starts, self.lengths, strict=True)):
            inside = slice(start, start + size)
            if mask is None:
                allowed[inside, inside] = True
            elif self.is_plain(number):
                allowed[inside, inside] = mask.dense(size)
            else:
                self.check_mask(mask)
                base, segments = self._segments_of(number)
                seen, positions, block = dense_segments(start, size, segments, base, self._blocks_of(number))
                allowed[inside, inside] = seen & mask.dense(size, positions, block)
        return allowed

    def __len__(self) -> int:
        return len(self.lengths)

    def __str__(self) -> str:
        padded = self.total - sum(self.lengths)
        note = f", {padded} padding" if padded else ""
        note += f", {len(self.segments)} segments of trees" if self.segments else ""
        note += f", {len(self.blocks)} blocks" if self.blocks else ""
        return f"{len(self)} documents, {self.total} tokens (longest {max(self.lengths, default=0)}{note})"
