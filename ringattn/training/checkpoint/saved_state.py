"""A checkpoint as it is read: by any number of ranks, whatever number wrote it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ringattn.training.checkpoint.marker import BadCheckpoint, FileSum
from ringattn.training.checkpoint.snapshot import (
    CODES,
    QMAP,
    SCALE,
    Snapshot,
    below,
    blocked,
    first_row,
    is_blocked,
    put_together,
    unblocked,
)
from ringattn.training.checkpoint.tensors import open_tensors, write_tensors

_PART = re.compile(r"rank-(\d{5,})\.safetensors")


def part_name(rank: int) -> str:
    """The file of a rank."""
    return f"rank-{rank:05d}.safetensors"


def write_part(folder: Path, rank: int, snapshot: Snapshot) -> FileSum:
    """Writes a rank's part of a checkpoint into `folder`, which exists. Raises OSError."""
    return write_tensors(folder / part_name(rank), snapshot.tensors, snapshot.index)


class SavedState:
    """The parts of a checkpoint that can be seen from here, opened as they are needed. Nothing of it is collective.

    Arguments:
        parts: files by the rank that wrote them.
        rank: whose part is looked into first.
    """

    def __init__(self, parts: Mapping[int, Path], rank: int) -> None:
        if not parts:
            raise BadCheckpoint("no part of the checkpoint is here")
        self._paths, self._rank = dict(parts), rank
        self._open: dict[int, _Part] = {}

    @classmethod
    def of(cls, folder: Path, rank: int) -> "SavedState":
        """All parts in a folder."""
        found = {int(match[1]): path for path in sorted(folder.iterdir()) if (match := _PART.fullmatch(path.name))}
        if not found:
            raise BadCheckpoint(f"{folder} holds no {part_name(0)}")
        return cls(found, rank)

    def own(self, *keys: str) -> Any:
        """What this rank saved below some keys, read whole. Raises KeyError if it saved no such thing, or nothing."""
        if self._rank not in self._paths:
            raise KeyError("/".join(keys))
        return SavedState({self._rank: self._paths[self._rank]}, self._rank).subtree(*keys)

    def subtree(self, *keys: str) -> Any:
        """What stands below some keys, read whole from the first part that has it; this rank's own comes first.

        Raises KeyError where none has.
        """
        for rank in self._ranks():
            part = self._part(rank)
            shape = part.below(keys)
            if shape is not None:
                return put_together(shape, lambda name, part=part: part.rows(name, 0, None))
        raise KeyError("/".join(keys))

    def fill(self, place: str, targets: Mapping[str, Any]) -> None:
        """Copies what was saved into tensors, nested in dicts: rows of a sharded one from whichever parts have them,
        any other from this rank's part, or else the first one.

        Raises BadCheckpoint for a tensor that is not there, or that has another shape.
        """
        for key, target in targets.items():
            name = below(place, key)
            if isinstance(target, Mapping):
                self.fill(name, target)
            elif isinstance(target, DTensor):
                self._fill_rows(name, target)
            elif isinstance(target, Tensor):
                self._fill_whole(name, target)

    def names(self, *keys: str) -> list[str]:
        """What stands below some keys, in the first part that has it: keys, or the places of a list. Nothing is read.

        Raises KeyError where none has.
        """
        for rank in self._ranks():
            shape = self._part(rank).below(keys)
            if isinstance(shape, dict) and "dict" in shape:
                return [str(key) for key, _ in shape["dict"]]
            if isinstance(shape, dict) and "list" in shape:
                return [str(place) for place in range(len(shape["list"]))]
        raise KeyError("/".join(keys))

    def rows(self, name: str, low: int, high: int) -> Tensor:
        """Rows `[low, high)` of a tensor that one part has whole. Raises BadCheckpoint where none has them."""
        for rank in self._ranks():
            part = self._part(rank)
            if part.has(name) and not part.is_shard(name) and high <= part.count(name):
                return part.rows(name, low, high)
        raise self._missing(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole of a tensor. Raises BadCheckpoint for one that is not there."""
        for rank in self._ranks():
            part = self._part(rank)
            if part.has(name):
                return tuple(part.place(name)[0]) if part.is_shard(name) else tuple(part.shape(name))
        raise self._missing(name)

    def whole(self, name: str) -> Tensor:
        """A tensor, put together from the rows of all parts. Raises BadCheckpoint if they are not all there."""
        made, done = None, 0
        for rank in self._ranks():
            part = self._part(rank)
            if not part.has(name):
                continue
            if not part.is_shard(name):
                return part.rows(name, 0, None)
            shape, first = part.place(name)
            rows = part.rows(name, 0, None)
            made = torch.empty(shape, dtype=rows.dtype) if made is None else made
            made[first : first + len(rows)] = rows
            done += len(rows)
        if made is None or done != len(made):
            raise self._missing(name)
        return made

    def _fill_whole(self, name: str, target: Tensor) -> None:
        for rank in self._ranks():
            part = self._part(rank)
            if part.has(name):
                found = part.rows(name, 0, None)
                if found.shape != target.shape:
                    raise BadCheckpoint(f"{part.path}: {name} has {[*found.shape]}, the run needs {[*target.shape]}")
                target.detach().copy_(found)
                return
        raise self._missing(name)

    def _fill_rows(self, name: str, target: DTensor) -> None:
        local, start, shape = target.to_local().detach(), first_row(target), [*target.shape]
        found: list[tuple[int, Tensor]] = []  # (first row in `local`, rows)
        done = 0
        for rank in self._ranks():
            if done == len(local):
                break
            part = self._part(rank)
            if not part.has(name):
                continue
            whole, first = part.place(name)
            if whole != shape:
                raise BadCheckpoint(f"{part.path}: {name} has {whole}, the run needs {shape}")
            low, high = max(start, first), min(start + len(local), first + part.count(name))
            if low < high:
                found.append((low - start, part.rows(name, low - first, high - first)))
                done += high - low
        if done != len(local):
            raise self._missing(name)
        _copy_rows(local, found)

    def _missing(self, name: str) -> BadCheckpoint:
        return BadCheckpoint(f"{next(iter(self._paths.values())).parent} does not hold all of {name}")

    def _ranks(self) -> list[int]:
        """Parts in the order to look: this rank's first."""
        return sorted(self._paths, key=lambda rank: (rank != self._rank, rank))

    def _part(self, rank: int) -> "_Part":
        if rank not in self._open:
            self._open[rank] = _Part(self._paths[rank])
        return self._open[rank]


class _Part:
    """One file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file, text = open_tensors(path)
        self._names = set(self._file.keys())
        try:
            index = json.loads(text)
            self._tree, self._rows, self._signed = index["tree"], index["rows"], index["signed"]
        except (ValueError, TypeError, KeyError) as error:
            raise BadCheckpoint(f"{path} is damaged: its index cannot be read: {error}") from None

    def below(self, keys: tuple[str, ...]) -> Any:
        shape = self._tree
        for key in keys:
            inner = dict(shape["dict"]) if isinstance(shape, dict) and "dict" in shape else {}
            if key not in inner:
                return None
            shape = inner[key]
        return shape

    def has(self, name: str) -> bool:
        return name in self._names or name + CODES in self._names

    def place(self, name: str) -> tuple[list[int], int]:
        """Shape of the whole tensor, and the first row of it that is here."""
        shape, start = self._rows[name]
        return shape, start

    def is_shard(self, name: str) -> bool:
        """Whether what is here are rows of something."""
        return name in self._rows

    def shape(self, name: str) -> list[int]:
        """Of what is here."""
        stored = name if name in self._names else name + CODES
        return list(self._file.get_slice(stored).get_shape())

    def count(self, name: str) -> int:
        """Rows that are here."""
        return self.shape(name)[0]

    def rows(self, name: str, low: int, high: int | None) -> Tensor:
        """Rows `[low, high)` of what is here, as they were saved: of moments of 8 bits in their blocks, where these
        begin and end with rows, and else in float32."""
        if name in self._names:
            return self._read(name, low, high)
        codes = self._read(name + CODES, 0, None)
        scale, qmap, signed = self._read(name + SCALE, 0, None), self._read(name + QMAP, 0, None), self._signed[name]
        high = len(codes) if high is None else high
        block, width = codes.numel() // scale.numel(), codes[0].numel()
        if low * width % block or high * width % block:
            return unblocked(blocked(codes, scale, qmap, signed))[low:high]
        return blocked(codes[low:high], scale[low * width // block : high * width // block], qmap, signed)

    def _read(self, name: str, low: int, high: int | None) -> Tensor:
        from safetensors import SafetensorError

        try:
            if low == 0 and high is None:
                whole: Tensor = self._file.get_tensor(name)
                return whole
            some: Tensor = self._file.get_slice(name)[low:high]
            return some
        except SafetensorError as error:
            raise BadCheckpoint(f"{self.path} is damaged: {error}") from None


def _copy_rows(local: Tensor, found: list[tuple[int, Tensor]]) -> None:
    """Copies pieces of rows into a shard. Blocks of 8 bits are copied as they are where all of them fit."""
    if is_blocked(local) and not all(_fits(local, first, rows) for first, rows in found):
        wide = torch.empty(local.shape, dtype=torch.float32, device=local.device)
        for first, rows in found:
            wide[first : first + len(rows)].copy_(rows)
        local.copy_(wide)
        return
    for first, rows in found:
        part = local if len(rows) == len(local) else local[first : first + len(rows)]
        part.copy_(rows)


def _fits(local: Any, first: int, rows: Tensor) -> bool:
    """Whether rows of 8 bits begin and end with blocks of the shard."""
    width = local.codes.numel() // len(local)
    return first * width % local.block_size == 0 and len(rows) * width % local.block_size == 0
