"""The records in files: lines of JSONL, rows of Parquet and of saved data sets, whole texts; compressed or not.

What cannot be read is a record too, one with an error, so that whoever reads decides whether to stop or to count.
"""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ringattn.training.data.kinds import HEAD, check_kind, check_records, is_jsonl

PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
_ROWS = 256  # of a table, read at once
_MARK = b"\xef\xbb\xbf"  # the byte order mark that some editors put before UTF-8
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError)


@dataclass(frozen=True)
class Record:
    """One document as it was found.

    Arguments:
        number: from 0 in its file; what cannot be read counts.
        where: for people, as in `line 3 of /data/a.jsonl`.
        value: keys and contents; None if there is an error, or nothing but bytes that were read.
        size: bytes that it took, for the progress.
        error: why it cannot be used.
    """

    number: int
    where: str
    value: dict[str, Any] | None
    size: int
    error: str = ""


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder is what `datasets` saved with `save_to_disk`."""
    return (path / "dataset_info.json").is_file() and (path / "state.json").is_file()


def is_saved_parts(path: Path) -> bool:
    """Whether a folder is a `DatasetDict` that was saved: parts such as `train` beside each other."""
    return (path / "dataset_dict.json").is_file()


def records_of(path: Path, field: str, start: int = 0) -> Iterator[Record]:
    """The records of a file or of a saved data set, from number `start` on.

    Arguments:
        field: of the text, where the whole file is one.
    """
    inner = Path(path.with_suffix("")) if path.suffix.lower() in PACKED else path
    if path.is_dir():
        yield from rows_of(saved_rows(path), str(path), start)
    elif inner.suffix.lower() == ".parquet" and inner == path:
        yield from _parquet(path, start)
    elif is_jsonl(inner):
        yield from _lines(path, start)
    elif start == 0:
        yield _whole(path, inner, field)


def saved_rows(path: Path) -> Any:
    """A data set that `datasets` saved, as a memory map."""
    from datasets import load_from_disk

    return load_from_disk(str(path))


def rows_of(rows: Any, name: str, start: int = 0) -> Iterator[Record]:
    """The rows of a data set of `datasets`; one with an index, or one that is only iterated."""
    if hasattr(rows, "__getitem__") and hasattr(rows, "__len__"):
        for number in range(start, len(rows)):
            yield Record(number, f"row {number + 1} of {name}", rows[number], 0)
        return
    for number, row in enumerate(rows.skip(start) if start else rows, start):
        yield Record(number, f"row {number + 1} of {name}", row, 0)


def opened(path: Path) -> IO[bytes]:
    """A file's content, unpacked on the way if its name says that it is packed."""
    kind = path.suffix.lower()
    if kind == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if kind == ".bz2":
        return bz2.open(path, "rb")
    if kind == ".xz":
        return lzma.open(path, "rb")
    if kind in PACKED:
        import pyarrow

        stream = pyarrow.input_stream(str(path), compression="zstd" if kind == ".zst" else "lz4")
        return io.BufferedReader(stream, 1 << 20)
    return open(path, "rb")


def _whole(path: Path, inner: Path, field: str) -> Record:
    where, size = str(path), _size(path)
    try:
        with opened(path) as file:
            data = file.read()
        check_kind(inner, data[:HEAD])
        check_records(inner, data[:HEAD], field)
        if b"\x00" in data:
            raise ValueError(f"byte {data.index(0):,} is 0: binary, not text")
        text = data.removeprefix(_MARK).decode("utf-8")
        if not text:
            raise ValueError("the file is empty")
    except UnicodeDecodeError as error:
        return Record(0, where, None, size, _not_utf8(data[error.start], f"byte {error.start:,}"))
    except _BROKEN as error:
        return Record(0, where, None, size, _reason(error))
    return Record(0, where, {field: text}, size)


def _lines(path: Path, start: int) -> Iterator[Record]:
    number = -1
    try:
        packed = path.suffix.lower() in PACKED
        with opened(path) as file:
            for number, line in enumerate(file):
                if number < start:
                    continue
                content = line.removeprefix(_MARK) if number == 0 else line
                if content.strip():
                    yield _line(number, f"line {number + 1:,} of {path}", content, 0 if packed else len(line))
        if packed:
            yield Record(number + 1, str(path), None, _size(path), "" if number >= 0 else "the file is empty")
        elif number < 0:
            yield Record(0, str(path), None, 0, "the file is empty")
    except _BROKEN as error:
        yield Record(number + 1, f"after line {number + 1:,} of {path}", None, 0, _reason(error))


def _line(number: int, where: str, line: bytes, size: int) -> Record:
    try:
        value = json.loads(line)
        if b"\\u" in line:  # JSON can write halves of surrogate pairs, which are no characters
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        return Record(number, where, None, size, _not_utf8(line[error.start], f"byte {error.start:,} of it"))
    except UnicodeEncodeError:
        return Record(number, where, None, size, "half a surrogate pair is no character")
    except (ValueError, RecursionError) as error:
        return Record(number, where, None, size, f"it is not JSON: {error}")
    if not isinstance(value, dict):
        return Record(number, where, None, size, f"it must be an object with keys, got {type(value).__name__}")
    return Record(number, where, value, size)


def _parquet(path: Path, start: int) -> Iterator[Record]:
    import pyarrow.parquet as parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            count = file.metadata.num_rows
            share = _size(path) / max(count, 1)
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if number + rows <= start:  # not read
                    number += rows
                    continue
                for batch in file.iter_batches(_ROWS, row_groups=[group]):
                    for row in batch.to_pylist():
                        if number >= start:
                            yield Record(number, f"row {number + 1:,} of {path}", row, round(share))
                        number += 1
            if not count:
                yield Record(0, str(path), None, 0, "the file is empty")
    except _BROKEN as error:
        yield Record(number, str(path), None, 0, _reason(error))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _not_utf8(byte: int, where: str) -> str:
    return f"it is not UTF-8: 0x{byte:02x} at {where}; convert it, as in iconv -f LATIN1 -t UTF-8"


def _reason(error: Exception) -> str:
    said = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return said.partition("\n")[0].removeprefix("data.files: ")
