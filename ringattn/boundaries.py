"""Boundaries of documents as others write them: cumulative lengths, positions, ids of tokens, padding masks.

Each function reads one of them, and refuses what would let documents mix, in a ValueError that names the argument.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from ringattn.integers import IntegerLike, integers, rows_of, runs_of, shown
from ringattn.segments import Range


class Spans(NamedTuple):
    """Documents of a stream of `total` tokens: tokens of each, and the index of its first."""

    lengths: list[int]
    starts: list[int]
    total: int


def lengths_of_cu_seqlens(cu_seqlens: IntegerLike) -> list[int]:
    cu = integers(cu_seqlens, "cu_seqlens")
    if not cu or cu[0] != 0:
        raise ValueError(f"cu_seqlens must start with 0, got {shown(cu)}")
    for index in range(1, len(cu)):
        if cu[index] < cu[index - 1]:
            raise ValueError(f"cu_seqlens must not decrease, got {cu[index - 1]} then {cu[index]} at entry {index}")
    return [b - a for a, b in pairwise(cu)]


def lengths_of_position_ids(position_ids: IntegerLike, first: int) -> list[int]:
    rows = rows_of(position_ids, "position_ids")
    if len(rows) != 1:
        raise ValueError(f"position_ids must describe one packed stream, shape (T,) or (1, T), got {len(rows)} rows")
    positions = rows[0]
    if positions and positions[0] != first:
        raise ValueError(
            f"position_ids must start with first = {first}, got {shown(positions)}; give first={positions[0]} if "
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
    return [b - a for a, b in pairwise([*bounds, len(positions)])]


def spans_of_segment_ids(segment_ids: IntegerLike) -> Spans:
    spans = Spans([], [], 0)
    base = 0
    for row_index, row in enumerate(rows_of(segment_ids, "segment_ids")):
        seen: set[int] = set()
        for start, stop in runs_of(row):
            if row[start] < 0:
                continue
            if row[start] in seen:
                raise ValueError(
                    f"segment_ids must hold each document in one run: id {row[start]} comes back at token {start} "
                    f"of row {row_index}"
                )
            seen.add(row[start])
            spans.lengths.append(stop - start)
            spans.starts.append(base + start)
        base += len(row)
    return spans._replace(total=base)


def spans_of_padding_mask(attention_mask: IntegerLike) -> Spans:
    spans = Spans([], [], 0)
    base = 0
    for index, row in enumerate(rows_of(attention_mask, "attention_mask")):
        if any(value not in (0, 1) for value in row):
            raise ValueError(f"attention_mask must hold 0 and 1 only, got {sorted(set(row))[:5]} in row {index}")
        runs = [(a, b) for a, b in runs_of(row) if row[a] == 1]
        if len(runs) > 1:
            raise ValueError(
                f"attention_mask row {index} has {len(runs)} runs of tokens with padding between them; "
                "one document per row is expected: use from_segment_ids for packed rows"
            )
        start, stop = runs[0] if runs else (0, 0)
        spans.lengths.append(stop - start)
        spans.starts.append(base + start)
        base += len(row)
    return spans._replace(total=base)


def blocks_of_ids(ids: Sequence[int], documents: Sequence[Range]) -> list[Range]:
    """Runs of equal ids in each of `documents`, those below 0 left out."""
    blocks: list[Range] = []
    for first, last in documents:
        seen: set[int] = set()
        for start, stop in runs_of(ids[first:last]):
            number = ids[first + start]
            if number in seen:
                raise ValueError(
                    f"block_ids must hold each block in one run: id {number} comes back at token {first + start}"
                )
            if number >= 0:
                seen.add(number)
                blocks.append((first + start, first + stop))
    return blocks


def block_ids_of_types(rows: Sequence[Sequence[int]], types: Sequence[int]) -> list[int]:
    """A number for each run of tokens of `types` in a row, and -1 for the tokens between."""
    ids: list[int] = []
    for row in rows:
        marked = [number in types for number in row]
        for index, (start, stop) in enumerate(runs_of([int(mark) for mark in marked])):
            ids += [len(ids) + index if marked[start] else -1] * (stop - start)
    return ids
