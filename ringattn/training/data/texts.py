"""The texts in files, one document each: a whole file, or a line of a JSONL file."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ringattn.training.data.json_lines import parsed
from ringattn.training.data.kinds import HEAD, check_records, is_jsonl

_MARK = b"\xef\xbb\xbf"  # the byte order mark that some editors put before UTF-8


def texts_of(path: Path, text_field: str) -> Iterator[tuple[str, int]]:
    """The texts of a UTF-8 file, each with the number of bytes that it took in the file.

    A text is what the file holds, line ends as they are; a byte order mark is left out. Empty lines of JSONL are
    passed over.

    Raises ValueError with the file, and with the line of a JSONL file, for what is no record with a text.
    """
    try:
        if is_jsonl(path):
            yield from _records(path, text_field)
            return
        data = path.read_bytes()
        check_records(path, data[:HEAD], text_field)
        yield data.removeprefix(_MARK).decode("utf-8"), len(data)
    except OSError as error:
        raise ValueError(f"data.files: {str(path)!r} cannot be read: {error.strerror}") from None


def said_of(record: Mapping[str, Any], key: str) -> str:
    """What a record has in the place of what is looked for under a key."""
    if key in record:
        kind = "null" if record[key] is None else type(record[key]).__name__
        return f"{key!r} is {kind}"
    return f"it has {', '.join(map(repr, record))[:200] or 'no keys'}"


def _records(path: Path, text_field: str) -> Iterator[tuple[str, int]]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            content = line.removeprefix(_MARK) if number == 1 else line
            if not content.strip():
                continue
            yield _text(path, number, content, text_field), len(line)


def _text(path: Path, number: int, line: bytes, text_field: str) -> str:
    where = f"line {number} of {path}"
    try:
        record = parsed(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data.files: {where} is not JSON: {error}") from None
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        has = said_of(record, text_field) if isinstance(record, dict) else "no object"
        raise ValueError(f"data.text_field={text_field!r} is no text in {where}: {has}")
    if b"\\u" in line:  # JSON can write halves of surrogate pairs, which are no characters
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"data.files: {where} has half a surrogate pair at character {error.start:,}") from None
    return text
