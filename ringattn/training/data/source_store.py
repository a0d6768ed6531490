"""A source's tokens on disk: written once by several processes, checked, and opened as memory maps by every rank.

tokens.bin and mask.bin (what is learned, one byte a token; absent where that is everything) hold the documents end to
end, offsets.npy where each begins, digests.npy a number for each by its tokens. store.json is written last, with the
sizes and checksums of them: without it nothing is complete.
"""

import hashlib
import json
import os
import shutil
import sys
import time
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ringattn.training.data.encoding import Encoding
from ringattn.training.data.meter import Meter, clock
from ringattn.training.data.shards import Shard
from ringattn.training.data.workers import Outcome, outcomes

FORMAT = 2
"""Part of every fingerprint: a store of another format is not found, and made anew."""

STOP, SKIP = "stop", "skip"
_PER_PROCESS = 1 << 22  # bytes that are worth the seconds that a process takes to start
_SHOWN = 5  # messages of what was passed over
_PART = 1 << 22
_BELIEVED = 3600  # seconds that a store which was read through is believed for
_SETTLED_NS = 2_000_000_000  # a file may change twice within the resolution of its time stamps


@dataclass(frozen=True)
class SourceStore:
    """Documents of a source.

    Arguments:
        tokens: (N,) unsigned integers, documents end to end; a memory map.
        mask: (N,) uint8, 1 where a token is learned; None for everywhere.
        offsets: (documents + 1,) int64.
        digests: (documents,) uint64, of each document's tokens.
        vocab_size: every token is smaller.
        skipped: records that could not be used, and were passed over.
        messages: the first of their errors.
    """

    tokens: npt.NDArray[Any]
    mask: npt.NDArray[np.uint8] | None
    offsets: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint64]
    vocab_size: int
    skipped: int = 0
    messages: tuple[str, ...] = ()


def digest_of(tokens: npt.NDArray[Any]) -> int:
    """A number for a document by its tokens, whatever integers hold them."""
    data = tokens.astype("<u4").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def write_source(
    folder: Path,
    shards: Sequence[Shard],
    encoding: Encoding,
    vocab_size: int,
    on_error: str,
    processes: int,
    unchanged: Callable[[], None],
) -> SourceStore:
    """Tokenizes a source into a folder and opens it.

    Arguments:
        vocab_size: of the tokenizer; 0 for ids, whose largest tells.
        on_error: of a record that cannot be used: `stop`, or `skip` it and count.
        processes: at most; a small source takes fewer.
        unchanged: raises ValueError if the files do not hold any more what the folder is named after.

    Raises ValueError for what cannot be used, naming the file and the line; then nothing is left behind, and so it is
    after an OSError of a disk that is full.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    try:
        body = _write(folder, shards, encoding, vocab_size, on_error, processes)
        unchanged()
        partial = folder / "store.json.partial"
        partial.write_text(json.dumps(body))
        os.replace(partial, folder / "store.json")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    store = open_source(folder)
    assert store is not None, "it was just written"
    took = clock(time.monotonic() - began)
    passed = f", {store.skipped:,} records passed over" if store.skipped else ""
    print(
        f"tokenized {len(store.digests):,} documents, {len(store.tokens):,} tokens in {took} into {folder}{passed}",
        flush=True,
    )
    return store


def open_source(folder: Path) -> SourceStore | None:
    """The store in a folder, or None if there is none that is whole, with a message where it once was.

    Its files are read through and their checksums compared, unless that was done within the hour and they were not
    touched since: the ranks of a start read them once.
    """
    try:
        body = json.loads((folder / "store.json").read_text())
        files = body["files"]
        if (damaged := _damaged(folder, files)) is not None:
            print(f"warning: {damaged} is not what was written; it is made again", file=sys.stderr, flush=True)
            return None
        dtype = np.dtype(body["dtype"])
        maps: dict[str, Any] = {
            name: np.memmap(folder / name, kind, mode="r") if files[name][0] else np.zeros(0, kind)
            for name, kind in (("tokens.bin", dtype), ("mask.bin", np.dtype(np.uint8)))
            if name in files
        }
        offsets, digests = np.load(folder / "offsets.npy"), np.load(folder / "digests.npy")
        messages = tuple(body["messages"])
        return SourceStore(
            maps["tokens.bin"], maps.get("mask.bin"), offsets, digests, body["vocab_size"], body["skipped"], messages
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _write(
    folder: Path, shards: Sequence[Shard], encoding: Encoding, vocab_size: int, on_error: str, processes: int
) -> dict[str, Any]:
    total = sum(path.stat().st_size for shard in shards for path in shard.files())
    processes = max(1, min(processes, total // _PER_PROCESS))
    dtype = np.dtype(np.uint8 if 0 < vocab_size <= 1 << 8 else np.uint16 if 0 < vocab_size <= 1 << 16 else np.uint32)
    records = (record for shard in shards for record in shard.records(encoding.field))
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "mask.bin", "wb") as mask:
        writer = _Writer(tokens, mask, dtype, on_error)
        with Meter("tokenizing", total) as meter:
            for one in outcomes(records, encoding, processes):
                writer.add(one)
                meter.add(one.size)
        writer.close()
    names = ["tokens.bin", "offsets.npy", "digests.npy"]
    if writer.masked:
        names.append("mask.bin")
    else:
        (folder / "mask.bin").unlink()
    np.save(folder / "offsets.npy", np.frombuffer(writer.offsets, np.int64))
    np.save(folder / "digests.npy", np.frombuffer(writer.digests, np.uint64))
    return {
        "vocab_size": vocab_size or writer.largest + 1,
        "dtype": dtype.name,
        "files": {name: [(folder / name).stat().st_size, _checksum(folder / name)] for name in names},
        "skipped": writer.skipped,
        "messages": writer.messages,
    }


class _Writer:
    """Appends documents to open files."""

    def __init__(self, tokens: IO[bytes], mask: IO[bytes], dtype: np.dtype[Any], on_error: str) -> None:
        self._tokens, self._mask, self._dtype, self._on_error = tokens, mask, dtype, on_error
        self.offsets, self.digests = array("q", [0]), array("Q")
        self.largest, self.skipped, self.masked = -1, 0, False
        self.messages: list[str] = []

    def add(self, one: Outcome) -> None:
        if one.error:
            self._pass_over(one.error)
        if one.encoded is None:
            return
        ids, mask = one.encoded
        self._tokens.write(ids.astype(self._dtype).tobytes())
        if mask is not None and not self.masked:
            self.masked = True
            for part in _ones(self.offsets[-1]):
                self._mask.write(part)
        if self.masked:
            self._mask.write((np.ones(len(ids), np.uint8) if mask is None else mask.astype(np.uint8)).tobytes())
        self.offsets.append(self.offsets[-1] + len(ids))
        self.digests.append(digest_of(ids))
        self.largest = max(self.largest, int(ids.max(initial=-1)))

    def close(self) -> None:
        """What is still in memory goes to the disk: a full one is heard of here."""
        for file in (self._tokens, self._mask):
            file.flush()
            os.fsync(file.fileno())

    def _pass_over(self, error: str) -> None:
        if self._on_error == STOP:
            raise ValueError(f"{error} (data.on_error=skip passes over such records and counts them)")
        self.skipped += 1
        if len(self.messages) < _SHOWN:
            self.messages.append(error)


def _damaged(folder: Path, files: dict[str, Any]) -> Path | None:
    """The first file that does not hold what was written, or None."""
    stamps = {}
    for name, (size, _) in files.items():
        status = (folder / name).stat()
        if status.st_size != size:
            return folder / name
        stamps[name] = [status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    memory = folder / "checked.json"
    try:
        known = json.loads(memory.read_text())
        if known["stamps"] == stamps and 0 <= time.time() - known["time"] < _BELIEVED:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    for name, (_, checksum) in files.items():
        if _checksum(folder / name) != checksum:
            return folder / name
    newest = max(stamp for of_file in stamps.values() for stamp in of_file[:2])
    if newest + _SETTLED_NS < time.time_ns():
        with suppress(OSError):  # a cache that can only be read is read through each time
            partial = memory.with_name(f"{memory.name}.{os.getpid()}.partial")
            partial.write_text(json.dumps({"time": time.time(), "stamps": stamps}))
            os.replace(partial, memory)
    return None


def _ones(count: int) -> Iterator[bytes]:
    for begin in range(0, count, _PART):
        yield b"\x01" * min(_PART, count - begin)


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while part := file.read(_PART):
            value = zlib.crc32(part, value)
    return value
