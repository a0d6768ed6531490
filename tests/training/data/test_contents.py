"""Only text is read, with the file and the byte of what is not; files are known by their contents."""

import gzip
import os
from pathlib import Path

import pytest

from ringattn.training.data import contents
from ringattn.training.data.contents import contents_of
from ringattn.training.data.texts import texts_of


def check(path: Path) -> str:
    return contents_of([path], path.parent / "memory.json")[0].digest


BINARY = {
    "a.txt": (gzip.compress(b"text", mtime=0), ["gzip", "unpack"]),
    "b.parquet": (b"PAR1\x15\x04\x15\x00PAR1", ["Parquet", ".jsonl"]),
    "c.txt": (b"PAR1\x15\x04\x15\x00PAR1", ["Parquet"]),
    "d.PNG": (b"\x89PNG\r\n\x1a\n\x00\x00", ["PNG", "pattern"]),
    "e": (b"\xff\xd8\xff\xe0\x00\x10JFIF", ["JPEG"]),
    "f.txt": (b"PK\x03\x04\x14\x00", ["zip"]),
    "g.txt": (b"\x28\xb5\x2f\xfd\x00", ["zstd"]),
    "h.txt": (b"%PDF-1.7\n", ["PDF"]),
    "i.txt": ("text".encode("utf-16"), ["UTF-16", "iconv"]),
    "j.txt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", ["Git LFS", "git lfs pull"]),
    "k.npy": (b"\x93NUMPY\x01\x00", ["NumPy"]),
    "l.jsonl.gz": (b"not even compressed", ["compressed by its name"]),
    "m.Jpeg": (b"not even a picture", ["picture by its name"]),
    "n.bz2": (b"BZh91AY&SY\x00", ["bzip2"]),
    "o.txt": (b"text and a \x00 zero", ["binary", "byte 11 is 0"]),
}


@pytest.mark.parametrize("name", BINARY)
def test_files_of_other_kinds_are_refused_by_name(name, tmp_path):
    data, words = BINARY[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"data\.files: ") as error:
        check(path)
    assert all(word in str(error.value) for word in [str(path), *words]), error.value


@pytest.mark.parametrize("text", ["PAR1 is how Parquet begins", "GIF89 is a format", "BZh", "Object\x0b", ""])
def test_text_that_begins_like_another_kind_is_text(text, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    assert check(tmp_path / "a.txt")


def test_encoding_errors_name_the_byte(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("naïve\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt' is not UTF-8: 0xef at byte 2; .*iconv"):
        check(path)
    path.write_bytes(b"ends inside \xe6\x97")
    with pytest.raises(ValueError, match=r"0xe6 at byte 12;"):
        check(path)


def test_encoding_errors_name_the_line_of_jsonl(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + '{"text": "naïve"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"0xef at byte 29, in line 3;"):
        check(path)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64])
def test_characters_may_lie_across_the_parts_that_are_read(size, tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "_PART", size)
    (tmp_path / "a.txt").write_text("aé日𝄞" * 5)
    assert check(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_bytes("aé日𝄞".encode() * 5 + b"\xff" + b"and more")
    with pytest.raises(ValueError, match=r"0xff at byte 50;"):
        check(tmp_path / "b.txt")


def counted(monkeypatch) -> list[Path]:
    read: list[Path] = []
    whole = contents._read_through
    monkeypatch.setattr(contents, "_read_through", lambda path, meter: (read.append(path), whole(path, meter))[1])
    return read


def test_what_is_known_is_not_read_again_and_what_may_have_changed_is(tmp_path, monkeypatch):
    path, memory = tmp_path / "a.txt", tmp_path / "memory.json"
    path.write_text("first")
    now = contents.time.time_ns
    monkeypatch.setattr(contents.time, "time_ns", lambda: now() + 10_000_000_000)
    read = counted(monkeypatch)
    first = contents_of([path], memory)
    assert contents_of([path], memory) == first
    assert len(read) == 1
    stamps = path.stat()
    path.write_text("other")  # as long, and as old as before: cp -p, rsync -t
    os.utime(path, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))
    assert contents_of([path], memory)[0].digest != first[0].digest
    path.write_text("first")
    assert contents_of([path], memory)[0].digest == first[0].digest
    os.utime(path)
    assert contents_of([path], memory)[0].digest == first[0].digest
    for broken in ("", "[]", '{"format": 1}', '{"format": 1, "files": {"x": 3}}'):
        memory.write_text(broken)
        assert contents_of([path], memory)[0].digest == first[0].digest


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, monkeypatch):
    """It may change again within the resolution of its time stamps."""
    path, memory = tmp_path / "a.txt", tmp_path / "memory.json"
    path.write_text("first")
    read = counted(monkeypatch)
    contents_of([path], memory)
    contents_of([path], memory)
    assert len(read) == 2


def test_a_file_that_changes_meanwhile(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("first")
    found = contents_of([path], tmp_path / "memory.json")[0]
    path.write_text("second")
    with pytest.raises(ValueError, match=r"a\.txt' was changed while it was read"):
        found.check_unchanged()


# --- texts


def texts(path: Path, field: str = "text") -> list[str]:
    return [text for text, _ in texts_of(path, field)]


def test_a_text_is_what_the_file_holds(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\rthree\u2028four\n".encode())
    assert texts(path) == ["one\r\ntwo\rthree\u2028four\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.JsonL", "a.ndjson"])
def test_lines_of_jsonl_are_documents_in_capitals_too(name, tmp_path):
    path = tmp_path / name
    path.write_bytes('\ufeff{"text": "one\u2028"}\r\n\n  \n{"text": "two"}'.encode())
    found = list(texts_of(path, "text"))
    assert [text for text, _ in found] == ["one\u2028", "two"]
    assert sum(size for _, size in found) == path.stat().st_size - len(b"\n  \n")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[" * 100_000, ["is not JSON"]),
        ('{"text": "x", "n": ' + "9" * 5000 + "}", ["is not JSON", "digits"]),
        ('{"text": "half \\ud83d"}', ["half a surrogate pair at character 5"]),
        ('{"text": null}', ["data.text_field='text'", "'text' is null"]),
        ('["text"]', ["data.text_field='text'", "no object"]),
        ("not json", ["is not JSON"]),
    ],
    ids=["deep", "long number", "surrogate", "null", "list", "words"],
)
def test_records_that_are_no_text_name_their_line(line, words, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "whole \\ud83d\\ude00"}\n' + line + "\n")
    with pytest.raises(ValueError, match=f"line 2 of {path}") as error:
        texts(path)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "a"}\n{"text": "b"}\n',
        '{"id": 1, "text": "a"}',
        '[{"id": 1, "text": "a"},\n {"text": "b"}]',
        '\n [ {\n "text" : "a"}]',
    ],
)
@pytest.mark.parametrize("name", ["train.json", "train.txt"])
def test_records_are_not_read_as_one_text(content, name, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"{name}'.*JSON.*'text'.*\.jsonl"):
        texts(path)
    assert texts(path, "body") == [content]


@pytest.mark.parametrize("content", ['{\n "text": "a"\n}\n', "{text}", "[1, 2]", '["text"]', ""])
def test_other_json_is_a_text_as_any(content, tmp_path):
    path = tmp_path / "package.json"
    path.write_text(content)
    assert texts(path) == [content]
