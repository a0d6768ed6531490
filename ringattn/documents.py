"""Document boundaries of a packed token stream: host-side integers, the only truth about who may attend to whom."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch

from ringattn.mask import Mask

IntegerLike = Sequence[int] | torch.Tensor


@dataclass(frozen=True, init=False)
class Documents:
    """Documents laid end to end in a stream of `total` tokens; tokens of no document are padding.

    Arguments:
        lengths: tokens of each document, >= 0, in stream order.
        starts: global index of each document's first token; default: end to end from 0.
        total: tokens of the stream, padding included; default: the end of the last document.

    Raises ValueError naming the argument for negative lengths, overlapping documents, or a total that is too small.
    """

    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    total: int

    def __init__(self, lengths: IntegerLike, starts: IntegerLike | None = None, total: int | None = None) -> None:
        sizes = _integers(lengths, "lengths")
        for index, size in enumerate(sizes):
            if size < 0:
                raise ValueError(f"lengths must be >= 0, got lengths[{index}] = {size}")
        ends = list(accumulate(sizes))
        begins = tuple(end - size for end, size in zip(ends, sizes, strict=True))
        if starts is not None:
            begins = _integers(starts, "starts")
            if len(begins) != len(sizes):
                raise ValueError(f"starts must have one entry per document: {len(sizes)} lengths, {len(begins)} starts")
        last = 0
        for index, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
            if begin < last:
                raise ValueError(f"starts[{index}] = {begin} lies before the end {last} of what comes before it")
            last = begin + size
        if total is not None and (not isinstance(total, int) or total < last):
            raise ValueError(f"total must be an integer >= {last}, the end of the last document, got {total!r}")
        object.__setattr__(self, "lengths", sizes)
        object.__setattr__(self, "starts", begins)
        object.__setattr__(self, "total", last if total is None else total)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: IntegerLike, total: int | None = None) -> "Documents":
        """From cumulative lengths `[0, l0, l0 + l1, ...]`; tokens between the last entry and `total` are padding."""
        cu = _integers(cu_seqlens, "cu_seqlens")
        if not cu or cu[0] != 0:
            raise ValueError(f"cu_seqlens must start with 0, got {_head(cu)}")
        for index in range(1, len(cu)):
            if cu[index] < cu[index - 1]:
                raise ValueError(f"cu_seqlens must not decrease, got {cu[index - 1]} then {cu[index]} at entry {index}")
        return cls([b - a for a, b in pairwise(cu)], total=total)

    @classmethod
    def from_position_ids(cls, position_ids: IntegerLike, first: int = 0) -> "Documents":
        """From the positions of the whole, unsharded stream: every document counts from `first` by ones.

        Accepts (T,) or (1, T); `first` is the position of a document's first token (2 for RoBERTa). Raises ValueError
        for anything else, since a guess here would let documents mix: a stream that starts inside a document (a shard),
        a jump inside one, a restart at another value, several axes (M-RoPE) or rows.
        """
        positions = _stream(position_ids, "position_ids")
        if positions and positions[0] != first:
            raise ValueError(
                f"position_ids must start with first = {first}, got {_head(positions)}; give first={positions[0]} if "
                "every document counts from there, and lengths or cu_seqlens for sharded or padded positions"
            )
        bounds = [index for index, position in enumerate(positions) if position == first]
        for index in range(1, len(positions)):
            if positions[index] != first and positions[index] != positions[index - 1] + 1:
                raise ValueError(
                    f"position_ids must count by ones and restart at {first} in every document, got "
                    f"{positions[index - 1]} then {positions[index]} at token {index}; "
                    "for sharded, padded or other positions give lengths or cu_seqlens"
                )
        return cls.from_cu_seqlens([*bounds, len(positions)] if positions else [0])

    @classmethod
    def from_segment_ids(cls, segment_ids: IntegerLike) -> "Documents":
        """From an id per token: each run of equal ids is a document, negative ids are padding.

        Accepts (T,), or (B, T) whose rows are laid end to end and never join. An id that comes back in the same row
        after another one raises ValueError: such tokens could not be one document of consecutive tokens.
        """
        rows = _rows(segment_ids, "segment_ids")
        spans: list[tuple[int, int]] = []
        base = 0
        for row_index, row in enumerate(rows):
            seen: set[int] = set()
            for start, stop in _runs(row):
                if row[start] < 0:
                    continue
                if row[start] in seen:
                    raise ValueError(
                        f"segment_ids must hold each document in one run: id {row[start]} comes back at token {start} "
                        f"of row {row_index}"
                    )
                seen.add(row[start])
                spans.append((base + start, stop - start))
            base += len(row)
        return cls([size for _, size in spans], [start for start, _ in spans], base)

    @classmethod
    def from_padding_mask(cls, attention_mask: IntegerLike) -> "Documents":
        """From a (B, S) or (S,) mask with 1 for tokens and 0 for padding on the left, the right or both sides.

        Rows are laid end to end, one document each. A hole inside a row raises ValueError: packed rows need
        `from_segment_ids`.
        """
        rows = _rows(attention_mask, "attention_mask")
        starts, lengths, base = [], [], 0
        for index, row in enumerate(rows):
            if any(value not in (0, 1) for value in row):
                raise ValueError(f"attention_mask must hold 0 and 1 only, got {sorted(set(row))[:5]} in row {index}")
            spans = [(a, b) for a, b in _runs(row) if row[a] == 1]
            if len(spans) > 1:
                raise ValueError(
                    f"attention_mask row {index} has {len(spans)} runs of tokens with padding between them; "
                    "one document per row is expected: use from_segment_ids for packed rows"
                )
            start, stop = spans[0] if spans else (0, 0)
            starts.append(base + start)
            lengths.append(stop - start)
            base += len(row)
        return cls(lengths, starts, base)

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

    @cached_property
    def padding(self) -> tuple[tuple[int, int], ...]:
        """Global ranges `(start, stop)` of the tokens of no document."""
        ends = [start + size for start, size in zip(self.starts, self.lengths, strict=True)]
        gaps = zip([0, *ends], [*self.starts, self.total], strict=True)
        return tuple((a, b) for a, b in gaps if b > a)

    def chunked(self, chunk: int | None) -> "Documents":
        """The same stream with every document cut in sub-documents of `chunk` tokens (the last may be shorter)."""
        if chunk is None:
            return self
        if chunk < 1:
            raise ValueError(f"chunk must be None or an integer >= 1, got {chunk}")
        spans = [
            (start + offset, min(chunk, size - offset))
            for start, size in zip(self.starts, self.lengths, strict=True)
            for offset in range(0, size, chunk)
        ]
        return Documents([size for _, size in spans], [start for start, _ in spans], self.total)

    def dense(self, mask: Mask | None = None) -> torch.Tensor:
        """Brute force: the (total, total) boolean matrix [query, key] under `mask` (None: all pairs of a document)."""
        allowed = torch.zeros(self.total, self.total, dtype=torch.bool, device="cpu")
        for start, size in zip(self.starts, self.lengths, strict=True):
            inside = slice(start, start + size)
            allowed[inside, inside] = (
                torch.ones(size, size, dtype=torch.bool, device="cpu") if mask is None else mask.dense(size)
            )
        return allowed

    def __len__(self) -> int:
        return len(self.lengths)

    def __str__(self) -> str:
        padded = self.total - sum(self.lengths)
        note = f", {padded} padding" if padded else ""
        return f"{len(self)} documents, {self.total} tokens (longest {max(self.lengths, default=0)}{note})"


def _integers(values: Any, name: str) -> tuple[int, ...]:
    if isinstance(values, torch.Tensor):
        if values.dim() != 1 or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise ValueError(f"{name} must be one-dimensional integers, got {tuple(values.shape)} of {values.dtype}")
        return tuple(values.tolist())
    try:
        out = tuple(int(value) for value in values)
        exact = all(a == b for a, b in zip(out, values, strict=True))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be a sequence of integers, got {values!r}") from None
    if not exact or any(isinstance(value, bool) for value in values):
        raise ValueError(f"{name} must be integers, got {_head(values)}")
    return out


def _rows(values: Any, name: str) -> list[list[int]]:
    """Nested rows of a (T,) or (B, T) tensor or list; bool counts as 0 and 1."""
    try:
        tensor = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be integers of shape (T,) or (B, T): {error}") from None
    if tensor.numel() == 0:  # an empty list becomes a float tensor
        tensor = tensor.to(torch.int64)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dim() not in (1, 2):
        raise ValueError(
            f"{name} must be integers of shape (T,) or (B, T), got {tuple(tensor.shape)} of {tensor.dtype}"
        )
    return torch.atleast_2d(tensor.to(torch.int64)).tolist()


def _stream(values: Any, name: str) -> list[int]:
    rows = _rows(values, name)
    if len(rows) != 1:
        raise ValueError(f"{name} must describe one packed stream, shape (T,) or (1, T), got {len(rows)} rows")
    return rows[0]


def _runs(row: list[int]) -> list[tuple[int, int]]:
    """Ranges of equal neighbours."""
    bounds = [0] + [i for i in range(1, len(row)) if row[i] != row[i - 1]] + [len(row)]
    return [(a, b) for a, b in pairwise(bounds) if b > a]


def _head(values: Sequence[int]) -> str:
    shown = ", ".join(str(value) for value in list(values)[:6])
    return f"[{shown}{', ...' if len(values) > 6 else ''}]"
