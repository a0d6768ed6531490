"""Band geometry: query pieces against runs of keys, cut into blocks and grouped into kernel calls. Pure integers."""

from dataclasses import dataclass, field
from typing import NamedTuple

from ringattn.kernels.spec import Block, Call, Range
from ringattn.mask import Band


class Piece(NamedTuple):
    """Positions `[first, last)` of a document, held from local row `row` on."""

    document: int
    first: int
    last: int
    row: int

    @property
    def stop_row(self) -> int:
        return self.row + self.last - self.first


@dataclass
class _Keys:
    """Keys of one block under construction: positions `[first, last)` in the rows up to `stop_row`.

    Several runs that touch in memory but not in the document may be joined. Their positions are then taken as if they
    ended where the last run ends without gaps, which `joined` allows only where the band cannot tell the difference.
    """

    first: int
    last: int
    stop_row: int

    def joined(self, other: "_Keys", query: Piece, band: Band) -> "_Keys | None":
        rows = other.last - other.first
        if self.stop_row != other.stop_row - rows:
            return None
        if self.last != other.first:
            sees_first = band.lo is None or self.first >= query.last - 1 + band.lo
            sees_last = band.hi is None or other.first - 1 <= query.first + band.hi
            if not (sees_first and sees_last):
                return None
        return _Keys(other.last - rows - (self.last - self.first), other.last, other.stop_row)


def blocks_of(query: Piece, runs: list[Piece], band: Band) -> list[Block]:
    """The blocks of one query piece over runs of keys of its document, in ascending order of their positions."""
    keys: list[_Keys] = []
    for run in runs:
        first = run.first if band.lo is None else max(run.first, query.first + band.lo)
        last = run.last if band.hi is None else min(run.last, query.last + band.hi)
        if first >= last:
            continue
        new = _Keys(first, last, run.row + last - run.first)
        joined = keys[-1].joined(new, query, band) if keys else None
        if joined is None:
            keys.append(new)
        else:
            keys[-1] = joined
    return [_block(query, part, band) for part in keys]


def _block(query: Piece, keys: _Keys, band: Band) -> Block:
    """Trim the queries that see none of the keys and align the band to the bottom right corner.

    With the last query at b - 1 and the last key at d - 1 the band `lo <= k - q <= hi` becomes `right = hi + b - d` and
    `left = -lo - b + d`; both are >= 0 after the trimming. A side that cuts nothing is open (-1), so that blocks of the
    same kind can share a call.
    """
    a = query.first if band.hi is None else max(query.first, keys.first - band.hi)
    b = query.last if band.lo is None else min(query.last, keys.last - band.lo)
    right = -1 if band.hi is None else band.hi + b - keys.last
    left = -1 if band.lo is None else keys.last - b - band.lo
    rows = query.row + a - query.first, query.row + b - query.first
    key_rows = keys.stop_row - (keys.last - keys.first), keys.stop_row
    if right >= rows[1] - rows[0] - 1:
        right = -1
    if left >= key_rows[1] - key_rows[0] - 1:
        left = -1
    return Block(rows, key_rows, left, right)


def join_full(blocks: list[Block]) -> list[Block]:
    """Blocks of adjacent query rows that see the same keys entirely, made one; sorted by rows."""
    out: list[Block] = []
    for block in sorted(blocks, key=lambda block: (block.k, block.left, block.right, block.q)):
        last = out[-1] if out else None
        same = last is not None and last.k == block.k and (last.left, last.right, block.left, block.right) == (-1,) * 4
        if last is not None and same and last.q[1] == block.q[0]:
            out[-1] = Block((last.q[0], block.q[1]), block.k)
        else:
            out.append(block)
    return sorted(out, key=lambda block: (block.q, block.k))


@dataclass
class _Group:
    """A call under construction. An open side of a block fits any bound that is wide enough for it."""

    blocks: list[Block] = field(default_factory=list)
    left: int = -1
    right: int = -1
    widest_q: int = 0
    widest_k: int = 0

    def take(self, block: Block, shared: Range) -> bool:
        """Add `block` if rows, keys and band fit. Skipped query rows get no keys, if their output is accumulated."""
        rows, keys = block.q[1] - block.q[0], block.k[1] - block.k[0]
        left = _common(self.left, self.widest_k, block.left, keys)
        right = _common(self.right, self.widest_q, block.right, rows)
        if left is None or right is None:
            return False
        if self.blocks:
            end, key_end = self.blocks[-1].q[1], self.blocks[-1].k[1]
            if block.q[0] < end or block.k[0] < key_end:
                return False
            if block.q[0] > end:
                if end < shared[0] or block.q[0] > shared[1]:
                    return False
                self.blocks.append(Block((end, block.q[0]), (key_end, key_end)))
        self.blocks.append(block)
        self.left, self.right = left, right
        self.widest_q, self.widest_k = max(self.widest_q, rows), max(self.widest_k, keys)
        return True


def _common(group: int, widest: int, side: int, width: int) -> int | None:
    """One bound that serves a group (its widest block open up to `widest` - 1) and a block, or None."""
    if group == side:
        return group
    if side == -1:
        return group if group >= width - 1 else None
    if group == -1:
        return side if side >= widest - 1 else None
    return None


def group_calls(blocks: list[Block], shared: Range) -> tuple[Call, ...]:
    """Few calls for the blocks of a stage: first fit in the order of query rows.

    Arguments:
        shared: query rows that are accumulated over calls.
    """
    groups: list[_Group] = []
    for block in blocks:
        if not any(group.take(block, shared) for group in groups):
            groups.append(_Group())
            groups[-1].take(block, shared)
    return tuple(Call(tuple(group.blocks), group.left, group.right) for group in groups)


def shared_rows(spans: list[Range], always: list[Range] | None = None) -> Range:
    """The smallest range that holds every row of two spans or more, and every row of `always`."""
    first, last = None, 0
    end = 0
    for start, stop in sorted(span for span in spans if span[0] < span[1]):
        if start < end:
            first = start if first is None else min(first, start)
            last = max(last, min(stop, end))
        end = max(end, stop)
    for start, stop in always or []:
        first = start if first is None else min(first, start)
        last = max(last, stop)
    return (0, 0) if first is None else (first, last)
