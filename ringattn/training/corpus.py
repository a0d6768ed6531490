"""Where documents come from: a corpus is one flat array of tokens and the offsets of its documents.

With the lengths of all documents in host memory, any rank can say what any pack of any step holds without reading it.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

BYTE_VOCABULARY = 256

Encoder = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Corpus:
    """Documents as token ids.

    Arguments:
        tokens: (N,) unsigned integers of all documents, end to end; may be a memory map.
        offsets: (documents + 1,) int64, where each document begins; the last entry is N.
        vocab_size: every id is smaller than this.
        fingerprint: changes when the documents change, so that a resumed run can tell.
    """

    tokens: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]
    vocab_size: int
    fingerprint: str

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def total(self) -> int:
        """Tokens of the whole corpus."""
        return int(self.offsets[-1])

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(np.diff(self.offsets).max(initial=0))

    def length(self, document: int) -> int:
        """Tokens of one document."""
        return int(self.offsets[document + 1] - self.offsets[document])

    def read(self, document: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens `[start, stop)` of one document, (stop - start,) int64."""
        base = int(self.offsets[document])
        return self.tokens[base + start : base + stop].astype(np.int64)


def corpus_of(documents: Sequence[npt.NDArray[Any]], vocab_size: int) -> Corpus:
    """A corpus held in memory, from one array of token ids per document."""
    tokens = np.concatenate(documents) if documents else np.zeros(0, np.uint8)
    offsets = np.cumsum([0, *(len(document) for document in documents)], dtype=np.int64)
    digest = hashlib.sha256(tokens.tobytes() + offsets.tobytes()).hexdigest()[:16]
    return Corpus(tokens, offsets, vocab_size, digest)


def stdlib_files() -> list[Path]:
    """The source files of the running Python's standard library, without installed packages, sorted by path."""
    outside = {"site-packages", "dist-packages", "__pycache__"}
    found: list[Path] = []
    for folder, inside, files in os.walk(sysconfig.get_paths()["stdlib"]):
        inside[:] = [name for name in inside if name not in outside]  # the others are not walked through
        found += [Path(folder, file) for file in files if file.endswith(".py")]
    return sorted(found)


def stdlib_corpus() -> Corpus:
    """The Python standard library, one document per file, tokens are bytes."""
    paths = stdlib_files()
    if not paths:
        raise ValueError(f"data.name=stdlib found no .py file under {sysconfig.get_paths()['stdlib']}")
    return corpus_of([np.frombuffer(path.read_bytes(), np.uint8) for path in paths], BYTE_VOCABULARY)


def matching_files(patterns: Sequence[str]) -> list[Path]:
    """The files of some paths, folders or glob patterns, sorted. Raises ValueError for one that matches nothing."""
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        matches = path.rglob("*") if path.is_dir() else map(Path, glob(str(path), recursive=True))
        files = {match for match in matches if match.is_file()}
        if not files:
            raise ValueError(f"data.files: {pattern!r} matches no file")
        found |= files
    return sorted(found)


def text_corpus(files: Sequence[Path], tokenizer: str, text_field: str, add_eos: bool, cache: Path) -> Corpus:
    """Text files (one document each) and JSONL files (one document per line), tokenized once into `cache`.

    Arguments:
        files: `.jsonl` files hold one object per line; any other file is one document.
        tokenizer: `bytes`, or the local folder of a Hugging Face tokenizer.
        text_field: key of the text in a JSONL object.
        add_eos: end every document with the tokenizer's end-of-sequence token, if it has one.
        cache: folder for the token store; it may be shared by processes and machines.

    Every process may call this at the same time: one writes the store under a file lock and the others wait for it,
    with no collective.
    """
    stat = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = json.dumps([stat, tokenizer, text_field, add_eos])
    fingerprint = hashlib.sha256(key.encode()).hexdigest()[:16]
    folder = cache / fingerprint
    if not (folder / "store.json").exists():
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / f"{fingerprint}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "store.json").exists():
                encode, vocab_size = _encoder(tokenizer, add_eos)
                _write_store(folder, _texts(files, text_field), encode, vocab_size)
    return _open_store(folder, fingerprint)


def _texts(files: Sequence[Path], text_field: str) -> Iterator[str]:
    for path in files:
        if path.suffix != ".jsonl":
            yield path.read_text(encoding="utf-8", errors="replace")
            continue
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"data.files: line {number} of {path} is not JSON: {error}") from None
                if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
                    raise ValueError(f"data.text_field={text_field!r} is no text in line {number} of {path}")
                yield record[text_field]


def _encoder(tokenizer: str, add_eos: bool) -> tuple[Encoder, int]:
    """The function from text to token ids, and its vocabulary size."""
    if tokenizer == "bytes":
        return lambda text: text.encode("utf-8"), BYTE_VOCABULARY
    from transformers import AutoTokenizer

    model = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    model.model_max_length = 1 << 62  # documents may be longer than the model that the tokenizer was made for
    tail = [model.eos_token_id] if add_eos and model.eos_token_id is not None else []
    return lambda text: [*model(text, add_special_tokens=False)["input_ids"], *tail], len(model)


def _write_store(folder: Path, texts: Iterator[str], encode: Encoder, vocab_size: int) -> None:
    """Writes tokens.bin, offsets.npy and, last, store.json; a store without store.json is not complete."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    dtype = np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.uint32
    offsets = [0]
    with open(folder / "tokens.bin", "wb") as out:
        for text in texts:
            ids = np.asarray(list(encode(text)), dtype)
            out.write(ids.tobytes())
            offsets.append(offsets[-1] + len(ids))
    np.save(folder / "offsets.npy", np.asarray(offsets, np.int64))
    partial = folder / "store.json.partial"
    partial.write_text(json.dumps({"vocab_size": vocab_size, "dtype": np.dtype(dtype).name}))
    os.replace(partial, folder / "store.json")


def _open_store(folder: Path, fingerprint: str) -> Corpus:
    description = json.loads((folder / "store.json").read_text())
    offsets = np.load(folder / "offsets.npy")
    if offsets[-1] == 0:
        raise ValueError("data.files hold no text at all")
    tokens = np.memmap(folder / "tokens.bin", dtype=description["dtype"], mode="r")
    return Corpus(tokens, offsets, description["vocab_size"], fingerprint)
