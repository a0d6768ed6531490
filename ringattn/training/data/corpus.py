"""Where documents come from: a corpus is one flat array of tokens and the offsets of its documents.

With the lengths of all documents in host memory, any rank can say what any pack of any step holds without reading it.
"""

import fcntl
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ringattn.training.data.contents import Content, contents_of
from ringattn.training.data.kinds import is_jsonl
from ringattn.training.data.store import FORMAT, BadStore, Store, open_store, write_store
from ringattn.training.data.tokenizer import BYTE_VOCABULARY, Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Corpus:
    """Documents as token ids.

    Arguments:
        tokens: (N,) unsigned integers of all documents, end to end; may be a memory map.
        offsets: (documents + 1,) int64, where each document begins; the last entry is N.
        vocab_size: every id is smaller than this.
        fingerprint: changes when the documents change, so that a resumed run can tell.
        digests: (documents,) uint64, a number for each by its tokens; None where they were not made.
        mask: (N,) uint8, 1 where a token is learned, that is, may be a target; None: everywhere. May be a memory map.
    """

    tokens: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]
    vocab_size: int
    fingerprint: str
    mask: npt.NDArray[np.uint8] | None = None
    digests: npt.NDArray[np.uint64] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the memory maps instead of getting copies of them."""
        mask = None if self.mask is None else _portable(self.mask)
        return _opened, (_portable(self.tokens), self.offsets, self.vocab_size, self.fingerprint, mask)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def total(self) -> int:
        """Tokens of the whole corpus."""
        return int(self.offsets[-1])

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(self.lengths.max(initial=0))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(documents,) tokens of each."""
        return np.diff(self.offsets)

    def length(self, document: int) -> int:
        """Tokens of one document."""
        return int(self.offsets[document + 1] - self.offsets[document])

    def read(self, document: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens `[start, stop)` of one document, (stop - start,) int64."""
        base = int(self.offsets[document])
        return self.tokens[base + start : base + stop].astype(np.int64)

    def learned(self, document: int, start: int, stop: int) -> npt.NDArray[np.bool_] | None:
        """Which of the tokens `[start, stop)` of one document may be targets, (stop - start,); None: all."""
        base = int(self.offsets[document])
        return None if self.mask is None else self.mask[base + start : base + stop].astype(bool)


def _portable(array: npt.NDArray[Any]) -> Any:
    """An array as another process gets it: a memory map, and no part of one, by its place."""
    if isinstance(array, np.memmap) and isinstance(array.base, mmap):
        return array.filename, array.dtype, array.offset, len(array)
    return array


def _opened(tokens: Any, offsets: npt.NDArray[np.int64], vocab_size: int, fingerprint: str, mask: Any) -> Corpus:
    return Corpus(_array(tokens), offsets, vocab_size, fingerprint, None if mask is None else _array(mask))


def _array(portable: Any) -> npt.NDArray[Any]:
    if not isinstance(portable, tuple):
        array: npt.NDArray[Any] = portable
        return array
    path, dtype, offset, count = portable
    return np.memmap(path, dtype, mode="r", offset=offset, shape=(count,))


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


def text_corpus(
    files: Sequence[Path], tokenizer: Tokenizer | str, text_field: str, add_eos: bool, cache: Path
) -> Corpus:
    """Text files (one document each) and JSONL files (one document per line), tokenized once into `cache`.

    Arguments:
        files: `.jsonl` files hold one object per line; any other file is one document.
        tokenizer: one that is loaded, or `bytes`, or the local folder of a Hugging Face tokenizer.
        text_field: key of the text in a JSONL object.
        add_eos: end every document with the tokenizer's end-of-sequence token, if it has one; counts for a tokenizer
            that is to be loaded.
        cache: folder for the token store; it may be shared by processes and machines.

    Every process may call this at the same time: one writes the store, or reads it through, under a file lock and the
    others wait for it, with no collective. A store that does not hold what was written is made again, with a message.
    The store, and the fingerprint of the corpus, are those of what the files and the tokenizer hold: neither a path nor
    a time counts.

    Raises ValueError for a file, a tokenizer or a cache folder that cannot be used.
    """
    encoder = load_tokenizer(tokenizer, add_eos) if isinstance(tokenizer, str) else tokenizer
    contents = _contents(files, cache)
    kinds = [(content.digest, is_jsonl(content.path)) for content in contents]
    key = json.dumps([FORMAT, kinds, encoder.fingerprint, text_field])
    fingerprint = hashlib.sha256(key.encode()).hexdigest()[:16]
    folder = cache / fingerprint
    try:
        with _locked(cache / f"{fingerprint}.lock"):
            store = _good_store(folder) or write_store(folder, contents, text_field, encoder)
    except OSError as error:
        # A cache that cannot be written to may hold the tokens all the same.
        found = _good_store(folder, remember=False)
        if found is None:
            raise ValueError(f"data.cache={str(cache)!r} cannot be used: {error.strerror or error}") from None
        store = found
    if not len(store.tokens):
        raise ValueError("data.files hold no text at all")
    return Corpus(store.tokens, store.offsets, store.vocab_size, fingerprint)


def _good_store(folder: Path, remember: bool = True) -> Store | None:
    """The store in a folder; None, and a message, if it is not what was written."""
    try:
        return open_store(folder, remember)
    except BadStore as error:
        print(f"warning: the token cache is not taken: {error}; it is made again", file=sys.stderr, flush=True)
        return None


def _contents(files: Sequence[Path], cache: Path) -> list[Content]:
    """The files by their contents, read by one process at a time: the next ones find them remembered."""
    memory = cache / "contents.json"
    try:
        with _locked(cache / "contents.lock"):
            return contents_of(files, memory)
    except OSError:  # a cache that cannot be written to may hold the tokens all the same
        return contents_of(files, memory, remember=False)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among the processes that ask for the same lock; waits for the others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
