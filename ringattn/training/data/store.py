"""Tokens on disk: written once, opened as a memory map by every rank, and never taken for what they are not."""

import json
import os
import shutil
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ringattn.training.data.contents import Content
from ringattn.training.data.meter import Meter, clock
from ringattn.training.data.texts import texts_of
from ringattn.training.data.tokenizer import Ids, Tokenizer

FORMAT = 2
"""Part of every corpus' fingerprint: a store of another format is not found, and made anew."""


@dataclass(frozen=True)
class Store:
    """Documents as tokens.

    Arguments:
        tokens: (N,) unsigned integers, documents end to end; a memory map.
        offsets: (documents + 1,) int64, where each begins; the last one is N.
        vocab_size: every token is smaller.
    """

    tokens: Ids
    offsets: npt.NDArray[np.int64]
    vocab_size: int


def write_store(folder: Path, contents: Sequence[Content], text_field: str, tokenizer: Tokenizer) -> Store:
    """Writes tokens.bin, offsets.npy and, last, store.json; without that a store is not complete. Opens it.

    Raises ValueError for a file that holds no documents, or that changes meanwhile; then nothing is left behind, and
    so it is after an OSError of a disk that is full.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    try:
        offsets = _write_tokens(folder / "tokens.bin", contents, text_field, tokenizer)
        np.save(folder / "offsets.npy", offsets)
        partial = folder / "store.json.partial"
        partial.write_text(json.dumps({"vocab_size": tokenizer.vocab_size, "dtype": np.dtype(tokenizer.dtype).name}))
        os.replace(partial, folder / "store.json")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    documents, tokens = len(offsets) - 1, int(offsets[-1])
    took = clock(time.monotonic() - began)
    print(f"tokenized {documents:,} documents, {tokens:,} tokens in {took} into {folder}", flush=True)
    store = open_store(folder)
    assert store is not None
    return store


def open_store(folder: Path) -> Store | None:
    """The store in a folder, or None if there is none that is whole."""
    try:
        description = json.loads((folder / "store.json").read_text())
        offsets = np.load(folder / "offsets.npy")
        dtype = np.dtype(description["dtype"])
        if (folder / "tokens.bin").stat().st_size != int(offsets[-1]) * dtype.itemsize:
            return None
        # A memory map cannot be empty.
        tokens = np.memmap(folder / "tokens.bin", dtype, mode="r") if offsets[-1] else np.zeros(0, dtype)
        return Store(tokens, offsets, int(description["vocab_size"]))
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError):
        return None


def _write_tokens(
    path: Path, contents: Sequence[Content], text_field: str, tokenizer: Tokenizer
) -> npt.NDArray[np.int64]:
    """Writes the tokens of all documents; their offsets."""
    offsets = array("q", [0])
    with open(path, "wb") as out, Meter("tokenizing", sum(content.size for content in contents)) as meter:
        for content in contents:
            for text, size in texts_of(content.path, text_field):
                written = 0
                for ids, characters in tokenizer.pieces(text):
                    out.write(ids.astype(tokenizer.dtype).tobytes())
                    written += len(ids)
                    meter.add(size * characters / max(len(text), 1))
                offsets.append(offsets[-1] + written)
            content.check_unchanged()
    return np.frombuffer(offsets, np.int64)
