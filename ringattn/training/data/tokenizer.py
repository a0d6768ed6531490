"""From text to token ids: bytes, or a saved Hugging Face tokenizer, known by what it does and not by its path."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

AUTO = "auto"
BYTES = "bytes"
BYTE_VOCABULARY = 256
PIECE = 1 << 20
"""Characters that are tokenized at once: a tokenizer takes some 150 bytes for each."""
MARGIN = 1 << 12
_TRIES = 32
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")

Ids = npt.NDArray[Any]


@dataclass(frozen=True)
class Tokenizer:
    """A function from text to token ids.

    Arguments:
        pieces: the ids of a text, in one or more arrays that follow each other, each with the number of characters
            that it is of.
        vocab_size: every id is smaller.
        fingerprint: changes when the ids of any text may change.
    """

    pieces: Callable[[str], Iterator[tuple[Ids, int]]]
    vocab_size: int
    fingerprint: str

    @property
    def dtype(self) -> npt.DTypeLike:
        """The smallest unsigned integers that hold every id."""
        return np.uint8 if self.vocab_size <= 1 << 8 else np.uint16 if self.vocab_size <= 1 << 16 else np.uint32


def has_tokenizer(folder: str) -> bool:
    """Whether a folder holds a saved tokenizer."""
    return any((Path(folder).expanduser() / name).is_file() for name in _FILES)


def load_tokenizer(source: str, add_eos: bool) -> Tokenizer:
    """`bytes`, or the tokenizer saved in a folder; `add_eos` ends every text with its end-of-sequence token.

    Raises ValueError for a folder without a tokenizer that can be read.
    """
    if source == BYTES:
        return Tokenizer(_bytes, BYTE_VOCABULARY, BYTES)
    model = saved_tokenizer(source)
    eos = model.eos_token_id if add_eos else None
    vocab_size = 1 + max(model.get_vocab().values(), default=-1)  # len(model) is less where ids have gaps
    if vocab_size == 0:
        raise ValueError(f"data.tokenizer={source!r} has an empty vocabulary")

    def encode(text: str) -> Ids:
        return np.asarray(model(text, add_special_tokens=False)["input_ids"], np.int64)

    def pieces(text: str) -> Iterator[tuple[Ids, int]]:
        yield from in_pieces(encode, text)
        if eos is not None:
            yield np.asarray([eos], np.int64), 0

    return Tokenizer(pieces, vocab_size, _fingerprint(model, source, eos))


def in_pieces(
    encode: Callable[[str], Ids], text: str, size: int = PIECE, margin: int = MARGIN
) -> Iterator[tuple[Ids, int]]:
    """The ids of a text, tokenized `size` characters and more at a time: what `encode(text)` gives, in less memory.
    With each piece comes the number of its characters.

    A text is cut where a word ends and a space begins, and only where the text on both sides of the cut, `margin`
    characters each, gives the same ids with the cut and without. Where no such place is found, as in a text without
    spaces, the next piece is longer, at worst the whole text.
    """
    begin = 0
    while begin < len(text):
        end = begin + size
        while end < len(text) and not (cut := _cut(encode, text, begin, end, margin)):
            end += size
        end = cut if end < len(text) else len(text)
        yield encode(text[begin:end]), end - begin
        begin = end


def _cut(encode: Callable[[str], Ids], text: str, begin: int, end: int, margin: int) -> int:
    """The last place for a cut before `end`, or 0."""
    tries = 0
    for place in range(end, max(begin, end - 16 * margin), -1):
        if not (text[place].isspace() and text[place - 1].isalnum()):
            continue
        left, right = text[max(begin, place - margin) : place], text[place : place + margin]
        if np.array_equal(encode(left + right), np.concatenate([encode(left), encode(right)])):
            return place
        if (tries := tries + 1) == _TRIES:
            break
    return 0


def _bytes(text: str) -> Iterator[tuple[Ids, int]]:
    yield np.frombuffer(text.encode("utf-8"), np.uint8), len(text)


def saved_tokenizer(folder: str) -> Any:
    """The tokenizer of transformers in a folder; documents may be longer than its model was made for.

    Raises ValueError.
    """
    from transformers import AutoTokenizer

    try:
        model = AutoTokenizer.from_pretrained(Path(folder).expanduser(), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of transformers, tokenizers (in Rust), sentencepiece: of any type
        if not has_tokenizer(folder):
            raise ValueError(
                f"data.tokenizer={folder!r} cannot be read: it holds none of {', '.join(_FILES)}"
            ) from None
        reason = str(error).strip().partition("\n")[0][:300]
        raise ValueError(f"data.tokenizer={folder!r} cannot be read: {type(error).__name__}: {reason}") from None
    model.model_max_length = 1 << 62  # documents may be longer than the model that the tokenizer was made for
    return model


def _fingerprint(model: Any, folder: str, eos: int | None) -> str:
    backend = getattr(model, "backend_tokenizer", None)
    if backend is not None:
        content = [backend.to_str()]
    else:
        names = sorted({*type(model).vocab_files_names.values(), "added_tokens.json", "tokenizer_config.json"})
        paths = [Path(folder).expanduser() / name for name in names]
        content = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()]
        content.append(sorted(model.get_vocab().items()))
    facts = [type(model).__name__, getattr(model, "split_special_tokens", False), eos, content]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
