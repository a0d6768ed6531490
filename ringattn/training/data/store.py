"""Tokens on disk: written once, opened as a memory map by every rank, and never taken for what they are not."""

import json
import os
import shutil
import time
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ringattn.training.checkpoint.marker import BadCheckpoint, FileSum
from ringattn.training.checkpoint.tensors import check_sum, sum_of
from ringattn.training.data.contents import Content
from ringattn.training.data.meter import Meter, clock
from ringattn.training.data.texts import texts_of
from ringattn.training.data.tokenizer import Ids, Tokenizer

FORMAT = 2
"""Part of every corpus' fingerprint: a store of another format is not found, and made anew."""

TOKENS, OFFSETS, DESCRIPTION, CHECKED = "tokens.bin", "offsets.npy", "store.json", "checked.json"
_BELIEVED = 3600  # seconds that a store which was read through is believed for: the ranks of a start read it once
_SETTLED_NS = 2_000_000_000  # a file may change twice within the resolution of its time stamps


@dataclass(frozen=True)
class Store:
    """Documents as tokens.

    Arguments:
        tokens: (N,) unsigned integers, documents end to end; a memory map.
        offsets: (documents + 1,) int64, where each begins; the last one is N.
        vocab_size: every token is smaller.
    """

    tokens: Ids
    offsets: npt.NDArray[np.int64]
    vocab_size: int


def write_store(folder: Path, contents: Sequence[Content], text_field: str, tokenizer: Tokenizer) -> Store:
    """Writes tokens.bin, offsets.npy and, last, store.json; without that a store is not complete. Opens it.

    Raises ValueError for a file that holds no documents, or that changes meanwhile; then nothing is left behind, and
    so it is after an OSError of a disk that is full.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    try:
        offsets, sums = _write_tokens(folder / TOKENS, contents, text_field, tokenizer)
        np.save(folder / OFFSETS, offsets)
        files = {TOKENS: sums, OFFSETS: sum_of(folder / OFFSETS)}
        body: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "dtype": np.dtype(tokenizer.dtype).name}
        body["files"] = {name: [one.size, one.crc32] for name, one in files.items()}
        partial = folder / f"{DESCRIPTION}.partial"
        partial.write_text(json.dumps(body | {"checksum": _checksum(body)}))
        os.replace(partial, folder / DESCRIPTION)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    documents, tokens = len(offsets) - 1, int(offsets[-1])
    took = clock(time.monotonic() - began)
    print(f"tokenized {documents:,} documents, {tokens:,} tokens in {took} into {folder}", flush=True)
    return _opened(folder)[0]


class BadStore(ValueError):
    """A store that was complete once and does not hold what was written; the message names the file and the reason."""


def open_store(folder: Path, remember: bool = True) -> Store | None:
    """The store in a folder, or None if there is none that was ever complete.

    Its files are read through, about 2 GB/s, unless that was done within the hour and they were not touched since.

    Arguments:
        remember: that they were read; nothing is written otherwise.

    Raises BadStore.
    """
    if not (folder / DESCRIPTION).exists():
        return None
    store, files = _opened(folder)
    stamps = {name: _stamp(folder / name) for name in files}
    if not _was_checked(folder, stamps):
        try:
            for name, expected in files.items():
                check_sum(folder / name, expected)
        except BadCheckpoint as error:
            raise BadStore(str(error)) from None
        now = time.time_ns()
        if remember and all(max(stamp[1:3]) + _SETTLED_NS < now for stamp in stamps.values()):
            partial = folder / f"{CHECKED}.partial"
            partial.write_text(json.dumps({"time": now / 1e9, "stamps": stamps}))
            os.replace(partial, folder / CHECKED)
    return store


def _opened(folder: Path) -> tuple[Store, dict[str, FileSum]]:
    """A store by its description and sizes, and what its files should hold. Raises BadStore."""
    path = folder / DESCRIPTION
    try:
        body = json.loads(path.read_text())
        stated = body.pop("checksum", None)
        if stated != _checksum(body):
            raise BadStore(f"{path} is damaged: it does not have the checksum that it states")
        files = {name: FileSum(*body["files"][name]) for name in (TOKENS, OFFSETS)}
        offsets, dtype = np.load(folder / OFFSETS), np.dtype(body["dtype"])
        size = (folder / TOKENS).stat().st_size
        if size != files[TOKENS].size or size != int(offsets[-1]) * dtype.itemsize:
            raise BadStore(f"{folder / TOKENS} has {size:,} bytes, {files[TOKENS].size:,} were written")
        # A memory map cannot be empty.
        tokens = np.memmap(folder / TOKENS, dtype, mode="r") if offsets[-1] else np.zeros(0, dtype)
        return Store(tokens, offsets, int(body["vocab_size"])), files
    except BadStore:
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError, AttributeError) as error:
        raise BadStore(f"{folder} is damaged: {str(error).partition(chr(10))[0]}") from None


def _was_checked(folder: Path, stamps: dict[str, list[int]]) -> bool:
    try:
        known = json.loads((folder / CHECKED).read_text())
        return known["stamps"] == stamps and 0 <= time.time() - known["time"] < _BELIEVED
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _checksum(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _write_tokens(
    path: Path, contents: Sequence[Content], text_field: str, tokenizer: Tokenizer
) -> tuple[npt.NDArray[np.int64], FileSum]:
    """Writes the tokens of all documents; their offsets, and what the file holds then."""
    offsets = array("q", [0])
    bytes_done = crc32 = 0
    with open(path, "wb") as out, Meter("tokenizing", sum(content.size for content in contents)) as meter:
        for content in contents:
            for text, size in texts_of(content.path, text_field):
                written = 0
                for ids, characters in tokenizer.pieces(text):
                    data = ids.astype(tokenizer.dtype).tobytes()
                    out.write(data)
                    bytes_done, crc32 = bytes_done + len(data), zlib.crc32(data, crc32)
                    written += len(ids)
                    meter.add(size * characters / max(len(text), 1))
                offsets.append(offsets[-1] + written)
            content.check_unchanged()
    return np.frombuffer(offsets, np.int64), FileSum(bytes_done, crc32)
