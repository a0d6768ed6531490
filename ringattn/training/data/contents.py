"""Files by what they hold: checked to be text, and hashed, so that a corpus is known by its contents alone."""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringattn.training.data.kinds import HEAD, check_kind, is_jsonl
from ringattn.training.data.meter import Meter

_PART = 1 << 20
_FORMAT = 1  # of the memory; another one when other files pass the checks
# A file may change twice within the resolution of its time stamps: younger ones are not remembered.
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True)
class Content:
    """A file of UTF-8 text as it was when it was read.

    Arguments:
        path: where it is.
        digest: SHA-256 of its bytes.
        stamp: size, times of change and inode; while they stay, so does the content.
    """

    path: Path
    digest: str
    stamp: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.stamp[0]

    def check_unchanged(self) -> None:
        """Raises ValueError if the file was written to since."""
        if _stamp(self.path) != self.stamp:
            raise ValueError(f"data.files: {str(self.path)!r} was changed while it was read; start again")


def contents_of(files: Sequence[Path], memory: Path, remember: bool = True, text: bool = True) -> list[Content]:
    """Checks and hashes files; those that `memory`, a JSON file, knows by their stamps are not read again.

    The memory only spares time: without it, or with one that cannot be read, the result is the same. With `remember`
    the files are written into it.

    Arguments:
        text: whether the files must be text; a memory is of one kind only.

    Raises ValueError for a file that is no UTF-8 text, naming the file and the byte, and OSError for a memory that
    cannot be written.
    """
    known = _remembered(memory)
    stamps = {path: _stamp(path) for path in files}
    found = {path: known[str(path)][-1] for path in files if known.get(str(path), [])[:-1] == list(stamps[path])}
    fresh = [path for path in files if path not in found]
    if fresh:
        for path in fresh if text else ():  # all of them before any is read through
            _check_head(path)
        with Meter("reading", sum(stamps[path][0] for path in fresh)) as meter:
            for path in fresh:
                found[path] = _read_through(path, meter) if text else _summed(path, meter)
        now = time.time_ns()
        settled = [path for path in fresh if max(stamps[path][1:3]) + _SETTLED_NS < now]
        if remember:
            _remember(memory, known | {str(path): [*stamps[path], found[path]] for path in settled})
    contents = [Content(path, found[path], stamps[path]) for path in files]
    for content in contents:
        content.check_unchanged()
    return contents


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(f"data.files: {str(path)!r} cannot be read: {error.strerror}") from None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _check_head(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            check_kind(path, file.read(HEAD))
    except OSError as error:
        raise ValueError(f"data.files: {str(path)!r} cannot be read: {error.strerror}") from None


def _summed(path: Path, meter: Meter) -> str:
    """The digest of a file, whatever it holds."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while part := file.read(_PART):
                digest.update(part)
                meter.add(len(part))
    except OSError as error:
        raise ValueError(f"data.files: {str(path)!r} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _read_through(path: Path, meter: Meter) -> str:
    """The digest of a file, if it is text."""
    digest, done, rest = hashlib.sha256(), 0, b""
    try:
        with open(path, "rb") as file:
            while part := file.read(_PART):
                digest.update(part)
                rest = _unfinished(path, rest + part, done - len(rest))
                done += len(part)
                meter.add(len(part))
    except OSError as error:
        raise ValueError(f"data.files: {str(path)!r} cannot be read: {error.strerror}") from None
    if rest:
        raise _not_utf8(path, rest[0], done - len(rest))
    return digest.hexdigest()


def _unfinished(path: Path, part: bytes, offset: int) -> bytes:
    """The bytes at the end of a part that the next one may complete to a character.

    Raises ValueError if the part, which begins at `offset`, is no text.
    """
    if (zero := part.find(b"\x00")) >= 0:
        raise ValueError(f"data.files: {str(path)!r} is binary, not text: byte {offset + zero:,} is 0")
    try:
        part.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data" and error.end == len(part):
            return part[error.start :]
        raise _not_utf8(path, part[error.start], offset + error.start) from None
    return b""


def _not_utf8(path: Path, byte: int, offset: int) -> ValueError:
    where = f"byte {offset:,}"
    if is_jsonl(path):
        with open(path, "rb") as file:
            line = 1 + file.read(offset).count(b"\n")
        where += f", in line {line:,}"
    return ValueError(
        f"data.files: {str(path)!r} is not UTF-8: 0x{byte:02x} at {where}; convert it, as in iconv -f LATIN1 -t UTF-8"
    )


def _remembered(memory: Path) -> dict[str, list[Any]]:
    try:
        stored = json.loads(memory.read_bytes())
        if stored["format"] == _FORMAT:
            return {path: entry for path, entry in stored["files"].items() if len(entry) == 5}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    return {}


def _remember(memory: Path, files: dict[str, list[Any]]) -> None:
    partial = memory.with_name(memory.name + ".partial")
    partial.write_text(json.dumps({"format": _FORMAT, "files": files}))
    os.replace(partial, memory)
