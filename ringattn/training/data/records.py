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

from ringattn.training.data.json_lines import parsed
from ringattn.training.data.kinds import HEAD, POINTER, check_head, check_kind, check_records, is_jsonl

PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
LONGEST = 1 << 30
"""Bytes of a text or a line at most: a small packed file may have any number, and memory has not."""
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
        yield from _saved(path, start)
    elif inner.suffix.lower() == ".parquet" and inner == path:
        yield from _parquet(path, start)
    elif is_jsonl(inner):
        yield from _lines(path, start)
    elif start == 0:
        yield _whole(path, inner, field)


def _saved(path: Path, start: int) -> Iterator[Record]:
    """The rows of a data set that `datasets` saved, a memory map."""
    from datasets import load_from_disk

    try:
        rows = load_from_disk(str(path))
    except IndexError:  # no table at all is written for no rows
        yield Record(0, str(path), None, 0, "the data set holds no rows")
        return
    except Exception as error:  # of datasets, pyarrow: of any type
        yield Record(0, str(path), None, 0, f"the data set cannot be read: {_reason(error)}")
        return
    yield from rows_of(rows, str(path), start)


def rows_of(rows: Any, name: str, start: int = 0) -> Iterator[Record]:
    """The rows of a data set of `datasets`; one with an index, or one that is only iterated. All columns, as plain
    Python, whatever format was set."""
    rows = rows.with_format(None)
    indexed = hasattr(rows, "__getitem__") and hasattr(rows, "__len__")
    found = (rows[number] for number in range(start, len(rows))) if indexed else rows.skip(start) if start else rows
    for number, row in enumerate(found, start):
        yield Record(number, f"row {number + 1:,} of {name}", _own(row), 0)


def _own(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table without what the table filled in: below its columns, all rows have the same keys."""
    return {key: _unfilled(value) for key, value in row.items()}


def _unfilled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unfilled(one) for key, one in value.items() if one is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [_unfilled(one) for one in value]
    return value


def opened(path: Path) -> IO[bytes]:
    """A file's content, unpacked on the way if its name says that it is packed. Raises ValueError, OSError."""
    kind = path.suffix.lower()
    if kind in PACKED and (head := _head(path)).startswith(POINTER):
        check_head(path, head)
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
            data = file.read(HEAD)
            check_kind(inner, data)
            _check_zeros(data)
            data += file.read(LONGEST + 1 - len(data))
        if len(data) > LONGEST:
            raise ValueError(f"the text is longer than {LONGEST:,} bytes: cut it")
        check_records(inner, data[:HEAD], field)
        _check_zeros(data)
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
            head = file.peek(HEAD)[:HEAD]  # type: ignore[attr-defined]
            check_head(path, head)
            _check_zeros(head)
            for number, line in enumerate(iter(lambda: file.readline(LONGEST + 1), b"")):
                if len(line) > LONGEST:
                    raise ValueError(f"the next line is longer than {LONGEST:,} bytes: cut it")
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
        value = parsed(line)
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
        if not (head := _head(path)).startswith(b"PAR1"):
            check_head(path, head)
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"the table has the column {twice[0]!r} twice")
            count = file.metadata.num_rows
            share = _size(path) / max(count, 1)
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if number + rows <= start:  # not read
                    number += rows
                    continue
                for batch in file.iter_batches(_ROWS, row_groups=[group]):
                    for row, error in _rows(batch):
                        if number >= start:
                            yield Record(number, f"row {number + 1:,} of {path}", row, round(share), error)
                        number += 1
            if not count:
                yield Record(0, str(path), None, 0, "the file is empty")
    except _BROKEN as error:
        yield Record(number, str(path), None, 0, _reason(error))


def _rows(batch: Any) -> Iterator[tuple[dict[str, Any] | None, str]]:
    """The rows of a batch, each with an error or none: one that cannot be read keeps no other from being read."""
    try:
        yield from ((_own(row), "") for row in batch.to_pylist())
    except UnicodeDecodeError:
        for number in range(len(batch)):
            try:
                (row,) = batch.slice(number, 1).to_pylist()
                yield _own(row), ""
            except UnicodeDecodeError as error:
                yield None, _not_utf8(error.object[error.start], f"byte {error.start:,}")


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEAD)


def _check_zeros(data: bytes) -> None:
    if (zero := data.find(b"\x00")) >= 0:
        raise ValueError(f"byte {zero:,} is 0: binary, not text")


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
