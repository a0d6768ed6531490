"""One rank's part of a checkpoint as a file: safetensors, whose checksum is taken as it is written.

The format (huggingface.co/docs/safetensors) is a length, a JSON header and the numbers: reading it runs nothing. The
library writes it too, but from a copy of everything, and the checksum would have to read it again.
"""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ringattn.training.checkpoint.marker import BadCheckpoint, FileSum

PIECE = 1 << 20  # bytes that are summed and written, or read, at a time: they stay in the processor's cache in between
INDEX = "ringattn"  # the header's text about what the tensors are

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.bool: "BOOL",
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, Tensor], index: str) -> FileSum:
    """Writes plain tensors, from wherever they are, and a text about them; both have reached the disk at the end.

    Raises OSError for a disk that cannot take them, and for a file that exists. About 2 GB/s are summed on one core
    (zlib), which waits for nothing of the interpreter's.
    """
    pieces: list[bytes | Tensor] = [_header(tensors, index), *(tensors[name] for name in _order(tensors))]
    size = crc32 = 0
    with open(path, "xb") as file:
        for piece in pieces:
            for part in _parts(piece):
                crc32 = zlib.crc32(part, crc32)
                size += len(part)
                file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return FileSum(size, crc32)


def file_size(tensors: Mapping[str, Tensor], index: str) -> int:
    """Bytes of the file that `write_tensors` would write."""
    return len(_header(tensors, index)) + sum(tensor.nbytes for tensor in tensors.values())


def sum_of(path: Path) -> FileSum:
    """Size and checksum of a file as it is now. Raises OSError."""
    size = crc32 = 0
    with open(path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(PIECE))
        while count := file.readinto(buffer):
            crc32 = zlib.crc32(buffer[:count], crc32)
            size += count
    return FileSum(size, crc32)


def check_sum(path: Path, expected: FileSum) -> None:
    """Raises BadCheckpoint, naming the file, if it does not hold what was written."""
    try:
        found = sum_of(path)
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    if found.size != expected.size:
        raise BadCheckpoint(f"{path} has {found.size:,} bytes, {expected.size:,} were written")
    if found != expected:
        raise BadCheckpoint(
            f"{path} is damaged: its checksum is {found.crc32:08x}, and was {expected.crc32:08x} when it was written"
        )


def open_tensors(path: Path) -> tuple[Any, str]:
    """A file that `write_tensors` wrote, as `safetensors.safe_open` gives it, and the text in it.

    Raises BadCheckpoint for any other.
    """
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(str(path), "pt")
        return file, (file.metadata() or {})[INDEX]
    except (SafetensorError, OSError, KeyError) as error:
        raise BadCheckpoint(f"{path} is no file of a checkpoint: {error}") from None


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Wide numbers first, so that every tensor begins at a multiple of its numbers' size."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _header(tensors: Mapping[str, Tensor], index: str) -> bytes:
    entries: dict[str, object] = {"__metadata__": {INDEX: index}}
    end = 0
    for name in _order(tensors):
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parts(piece: bytes | Tensor) -> list[memoryview]:
    if isinstance(piece, Tensor):
        numbers = piece.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        view = numbers.numpy().data
    else:
        view = memoryview(piece)
    return [view[start : start + PIECE] for start in range(0, len(view), PIECE)]
