"""What kind of file this is, by its name and by its first bytes, and what to do about a kind that holds no text."""

import re
from pathlib import Path

JSONL = (".jsonl", ".ndjson", ".jsonlines")
POINTER = b"version https://git-lfs.github.com/spec/"
"""How the file begins that Git LFS leaves in the place of one that was not fetched."""
HEAD = 4096
"""Bytes from the beginning of a file that `refusal_of_head` wants to see."""

_UNPACK = "unpack it first"
_TABLE = "write its column of texts to a .jsonl file"
_LEAVE = "leave it out, with a pattern such as 'folder/**/*.txt' in place of the folder"
# Kind, what to do, suffixes.
_NAMED = (
    ("compressed", _UNPACK, "gz tgz bz2 tbz xz txz zst zstd lz4 lzma z zip 7z rar tar"),
    ("a table", "if `datasets` saved it, name its folder as a source; else " + _TABLE, "arrow"),
    ("a table", _TABLE, "parquet feather orc avro xls xlsx ods sqlite sqlite3"),
    ("a picture", _LEAVE, "png jpg jpeg gif bmp tif tiff webp ico heic psd"),
    ("sound or film", _LEAVE, "mp3 wav flac ogg opus mp4 mkv mov avi webm"),
    ("a formatted document", "export its text first", "pdf doc docx odt ppt pptx epub"),
    ("arrays or weights", _LEAVE, "npy npz pt pth safetensors gguf onnx h5 hdf5 pkl pickle msgpack bin idx"),
    ("a program", _LEAVE, "pyc pyo so o a dll exe class jar whl"),
)
_BY_SUFFIX = {f".{suffix}": (kind, advice) for kind, advice, suffixes in _NAMED for suffix in suffixes.split()}
# What the file is, what to do, its first bytes.
_SIGNATURES = (
    ("gzip", _UNPACK, b"\x1f\x8b"),
    ("bzip2", _UNPACK, b"BZh"),
    ("xz", _UNPACK, b"\xfd7zXZ\x00"),
    ("zstd", _UNPACK, b"\x28\xb5\x2f\xfd"),
    ("lz4", _UNPACK, b"\x04\x22\x4d\x18"),
    ("zip (or what is made of it, such as docx and npz)", _UNPACK, b"PK\x03\x04"),
    ("7z", _UNPACK, b"7z\xbc\xaf\x27\x1c"),
    ("Parquet", _TABLE, b"PAR1"),
    ("Arrow", _TABLE, b"ARROW1"),
    ("Avro", _TABLE, b"Obj\x01"),
    ("SQLite", _TABLE, b"SQLite format 3\x00"),
    ("PNG", _LEAVE, b"\x89PNG"),
    ("JPEG", _LEAVE, b"\xff\xd8\xff"),
    ("GIF", _LEAVE, b"GIF8"),
    ("PDF", "export its text first", b"%PDF-"),
    ("an ELF program", _LEAVE, b"\x7fELF"),
    ("NumPy", _LEAVE, b"\x93NUMPY"),
    ("HDF5", _LEAVE, b"\x89HDF"),
    ("a Git LFS pointer", "fetch what it stands for with `git lfs pull`", POINTER),
    ("UTF-32 text", "convert it: iconv -f UTF-32 -t UTF-8", b"\xff\xfe\x00\x00"),
    ("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8", b"\xff\xfe"),
    ("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8", b"\xfe\xff"),
)


def is_jsonl(path: Path) -> bool:
    """Whether a file holds one JSON object per line: by its name, in capitals or not."""
    return path.suffix.lower() in JSONL


def check_kind(path: Path, head: bytes) -> None:
    """Raises ValueError for a file that is something other than text.

    Arguments:
        path: its last suffix tells; a name without a known one is taken for text.
        head: its first bytes, `HEAD` of them or all.
    """
    check_head(path, head)
    if known := _BY_SUFFIX.get(path.suffix.lower()):
        kind, advice = known
        raise ValueError(f"data.files: {str(path)!r} is {kind} by its name, not text: {advice}")


def check_head(path: Path, head: bytes) -> None:
    """Raises ValueError for a file that begins as something other than text does, whatever its name."""
    for kind, advice, begin in _SIGNATURES:
        # Text may begin with a signature of printable letters: then the zero bytes tell.
        if head.startswith(begin) and not (begin.isalnum() and _plain(head)):
            raise ValueError(f"data.files: {str(path)!r} holds {kind}, not text: {advice}")


def check_records(path: Path, head: bytes, text_field: str) -> None:
    """Raises ValueError for JSON records in a file that would be read as one text, brackets and all."""
    begin = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    field = re.compile(rb'"' + re.escape(text_field.encode()) + rb'"\s*:\s*"')
    if begin.startswith(b"[") and re.match(rb"\[\s*\{", begin) and field.search(begin):
        raise ValueError(
            f"data.files: {str(path)!r} is a JSON list of records with {text_field!r}: write it as .jsonl, one record "
            "per line"
        )
    line, newline, _ = begin.partition(b"\n")
    if line.startswith(b"{") and field.search(line) and (line.rstrip().endswith(b"}") or not newline):
        raise ValueError(
            f"data.files: {str(path)!r} holds JSON records with {text_field!r}, one per line: name it .jsonl"
        )


def _plain(head: bytes) -> bool:
    return b"\x00" not in head and all(byte >= 32 or byte in b"\t\r\n\f\x1b" for byte in head)
