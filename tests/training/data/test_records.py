"""Files that are damaged or are not what their name says: named where they are broken, the rest of them kept."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("datasets")

import datasets
import pyarrow
import pyarrow.parquet

from ringattn.training.data import records as records_module
from ringattn.training.data.records import records_of
from ringattn.training.data.texts import texts_of

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n"
LINE = b'{"text": "x"}\n'


def told(path: Path) -> list[str]:
    """The errors of a file, each with its place."""
    return [f"{one.where}: {one.error}" for one in records_of(path, "text") if one.error]


def held(path: Path) -> list[object]:
    return [one.value["text"] for one in records_of(path, "text") if one.value is not None]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", POINTER, "holds a Git LFS pointer"),
        ("a.parquet", POINTER, "holds a Git LFS pointer"),
        ("a.jsonl.gz", POINTER, "holds a Git LFS pointer"),
        ("a.jsonl", gzip.compress(LINE, mtime=0), "holds gzip, not text"),
        ("a.jsonl", LINE.decode().encode("utf-16"), "holds UTF-16 text, not text: convert it: iconv -f UTF-16"),
        ("a.jsonl", LINE.decode().encode("utf-16-be"), "byte 0 is 0: binary, not text"),
        ("a.jsonl", b"\x00" * 99, "byte 0 is 0: binary, not text"),
        ("a.jsonl.gz", gzip.compress(b"\x00" * 99, mtime=0), "byte 0 is 0: binary, not text"),
        ("a.txt.gz", gzip.compress(b"a\x00", mtime=0), "byte 1 is 0: binary, not text"),
        ("a.parquet", LINE, "Parquet magic bytes not found"),
    ],
)
def test_a_file_that_is_something_else_is_one_error(name, data, words, tmp_path):
    path = tmp_path / name
    path.write_bytes(data)
    (error,) = told(path)
    assert words in error
    assert str(path) in error
    assert held(path) == []


def test_halves_of_characters_are_no_text_however_they_are_written(tmp_path):
    """As three bytes they pass Python's JSON reader; tokenizers fail on them."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE + b'{"text": "a\xed\xa0\x80b"}\n' + LINE)
    (error,) = told(path)
    assert error.startswith(f"line 2 of {path}: it is not UTF-8: 0xed at byte 11 of it")
    assert held(path) == ["x", "x"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt.gz"])
def test_what_unpacks_without_end_is_not_read_to_the_end(name, tmp_path, monkeypatch):
    monkeypatch.setattr(records_module, "LONGEST", 1 << 16)
    data = LINE + b'{"text": "' + b" " * (1 << 20)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    (error,) = told(tmp_path / name)
    assert "longer than 65,536 bytes" in error


def test_one_bad_row_of_a_table_is_named_and_the_others_kept(tmp_path):
    offsets, letters = np.arange(4, dtype=np.int32), pyarrow.py_buffer(b"a\xffb")
    texts = pyarrow.StringArray.from_buffers(3, pyarrow.py_buffer(offsets.tobytes()), letters)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    assert held(tmp_path / "a.parquet") == ["a", "b"]
    (error,) = told(tmp_path / "a.parquet")
    assert error.startswith(f"row 2 of {tmp_path / 'a.parquet'}: it is not UTF-8: 0xff at byte 0")
    assert [one.number for one in records_of(tmp_path / "a.parquet", "text")] == [0, 1, 2]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_what_a_table_fills_in_is_not_there(kind, tmp_path):
    """Rows of a table have the same keys at every depth: the arguments of one tool have those of others, with null."""
    calls = [{"name": "add", "arguments": {"a": 1, "by": [1, 2]}}, {"name": "ask", "arguments": {"whom": "me"}}]
    rows = {"text": [{"calls": [call], "tried": None} for call in calls]}
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    else:
        datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "a.parquet")
    assert held(tmp_path / "a.parquet") == [{"calls": [call]} for call in calls]


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas"])
def test_a_saved_data_set_is_read_whatever_it_was_set_to_return(kind, tmp_path):
    rows = datasets.Dataset.from_dict({"text": [[1, 2], [3]], "more": ["a", "b"]})
    rows.set_format(kind, columns=["more"] if kind == "pandas" else None)
    rows.save_to_disk(tmp_path / "a")
    assert held(tmp_path / "a") == [[1, 2], [3]]


def damaged(path: Path, kind: str) -> None:
    rows = datasets.Dataset.from_dict({"text": [] if kind == "empty" else ["x" * 900] * 50})
    rows.save_to_disk(path)
    for table in path.glob("*.arrow"):
        table.write_bytes(table.read_bytes()[:-3000])
        if kind == "gone":
            table.unlink()


@pytest.mark.parametrize("kind", ["cut", "gone", "empty"])
def test_a_damaged_data_set_is_named(kind, tmp_path):
    damaged(tmp_path / "a", kind)
    (error,) = told(tmp_path / "a")
    assert error.startswith(f"{tmp_path / 'a'}: ")
    assert ("holds no rows" if kind == "empty" else "cannot be read") in error


def test_null_is_not_called_absent(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": None, "id": 1}) + "\n")
    with pytest.raises(ValueError, match="'text' is null"):
        list(texts_of(path, "text"))


def test_a_column_that_stands_twice_is_refused(tmp_path):
    """As a row Python would have the last of the two."""
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert told(tmp_path / "a.parquet") == [f"{tmp_path / 'a.parquet'}: the table has the column 'text' twice"]
    assert held(tmp_path / "a.parquet") == []
