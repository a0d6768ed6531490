"""Corpora: true lengths, one tokenization, clear refusals."""

import json
import os
import resource
import tracemalloc
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from ringattn.training.data import corpus as corpus_module
from ringattn.training.data import store
from ringattn.training.data import tokenizer as data_tokenizer
from ringattn.training.data.corpus import stdlib_corpus, stdlib_files, text_corpus
from ringattn.training.data.files import matching_files


def test_stdlib_holds_every_file_at_its_true_length():
    paths, corpus = stdlib_files(), stdlib_corpus()
    assert len(corpus) == len(paths) > 100
    assert not any("site-packages" in path.parts or "dist-packages" in path.parts for path in paths)
    for index in (0, len(paths) // 2, len(paths) - 1):
        data = paths[index].read_bytes()
        assert corpus.length(index) == len(data)
        assert bytes(corpus.read(index, 0, len(data)).astype(np.uint8)) == data
    assert corpus.vocab_size == 256
    assert corpus.fingerprint == stdlib_corpus().fingerprint


def open_text(files: list[Path], cache: Path, tokenizer: str = "bytes", field: str = "text"):
    return text_corpus(files, tokenizer, field, True, cache)


def read_all(corpus) -> list[bytes]:
    return [bytes(corpus.read(i, 0, corpus.length(i)).astype(np.uint8)) for i in range(len(corpus))]


def test_files_and_jsonl_lines_are_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one é")
    (tmp_path / "b.jsonl").write_text('{"body": "two"}\n\n{"body": ""}\n{"body": "three"}\n')
    corpus = open_text(matching_files([str(tmp_path / "*")]), tmp_path / "cache", field="body")
    assert read_all(corpus) == ["one é".encode(), b"two", b"", b"three"]


def test_the_store_is_written_once_and_anew_when_a_file_changes(tmp_path):
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("first")
    first = open_text([path], cache)
    stamp = (cache / first.fingerprint / "tokens.bin").stat().st_mtime_ns
    again = open_text([path], cache)
    assert (cache / again.fingerprint / "tokens.bin").stat().st_mtime_ns == stamp
    path.write_text("second!")
    assert read_all(open_text([path], cache)) == [b"second!"]


def test_neither_a_time_nor_a_place_counts(tmp_path):
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("text")
    first = open_text([path], cache).fingerprint
    os.utime(path, (0, 0))
    assert open_text([path], cache).fingerprint == first
    path.rename(tmp_path / "b.txt")
    assert open_text([tmp_path / "b.txt"], cache).fingerprint == first
    (tmp_path / "b.txt").rename(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").write_text('{"text": "text"}')
    assert open_text([tmp_path / "b.jsonl"], cache).fingerprint != first


def save_words(folder: Path, *words: str) -> str:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=model).save_pretrained(folder)
    return str(folder)


def test_another_tokenizer_in_the_same_folder_gives_other_tokens(tmp_path):
    (tmp_path / "a.txt").write_text("a b")
    files, cache = [tmp_path / "a.txt"], tmp_path / "cache"
    first = open_text(files, cache, save_words(tmp_path / "t", "?", "a", "b"))
    other = open_text(files, cache, save_words(tmp_path / "t", "?", "b", "a"))
    again = open_text(files, cache, save_words(tmp_path / "elsewhere", "?", "a", "b"))
    assert [corpus.read(0, 0, 2).tolist() for corpus in (first, other, again)] == [[1, 2], [2, 1], [1, 2]]
    assert first.fingerprint == again.fingerprint != other.fingerprint


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "store.json"])
@pytest.mark.parametrize("length", [0, -1])
def test_a_store_that_is_not_whole_is_written_again(name, length, tmp_path):
    """As a machine that lost power leaves it: renamed, and without its last bytes."""
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("some text")
    damaged = cache / open_text([path], cache).fingerprint / name
    damaged.write_bytes(damaged.read_bytes()[:length])
    assert read_all(open_text([path], cache)) == [b"some text"]


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "store.json"])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_store_with_a_turned_bit_is_named_and_made_again(name, place, tmp_path, capsys):
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("some text")
    first = open_text([path], cache)
    damaged = cache / first.fingerprint / name
    data = bytearray(damaged.read_bytes())
    data[{"first": 0, "middle": len(data) // 2, "last": -1}[place]] ^= 2
    damaged.write_bytes(data)
    capsys.readouterr()
    again = open_text([path], cache)
    assert read_all(again) == [b"some text"]
    assert again.vocab_size == first.vocab_size
    told = capsys.readouterr().err
    assert told.startswith(f"warning: the token cache is not taken: {cache / first.fingerprint}"), told
    assert "; it is made again" in told
    open_text([path], cache)
    assert capsys.readouterr().err == ""


def test_a_store_is_read_through_once_for_the_ranks_of_a_start(tmp_path, monkeypatch):
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("some text")
    folder = cache / open_text([path], cache).fingerprint
    reads = []
    monkeypatch.setattr(store, "check_sum", lambda path, expected: reads.append(path.name))
    monkeypatch.setattr(store, "_SETTLED_NS", -(10**12))
    for _ in range(3):
        open_text([path], cache)
    assert sorted(reads) == ["offsets.npy", "tokens.bin"]
    os.utime(folder / "tokens.bin")
    open_text([path], cache)
    assert len(reads) == 4
    monkeypatch.setattr(store, "_BELIEVED", 0)  # a later start
    open_text([path], cache)
    assert len(reads) == 6


def test_a_damaged_store_that_cannot_be_made_again_is_refused(tmp_path, monkeypatch):
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("text")
    tokens = cache / open_text([path], cache).fingerprint / "tokens.bin"
    tokens.write_bytes(b"tixt")

    def sealed(path: Path):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(corpus_module, "_locked", sealed)
    with pytest.raises(ValueError, match=r"data\.cache=.* cannot be used: Read-only file system"):
        open_text([path], cache)


def test_a_cache_of_another_format_is_left_alone(tmp_path):
    """Stores used to be named after paths and times; one that has the name of today's by chance is made anew."""
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("text")
    folder = cache / open_text([path], cache).fingerprint
    np.save(folder / "offsets.npy", np.asarray([0, 3, 9]))
    assert read_all(open_text([path], cache)) == [b"text"]
    (folder / "store.json").write_text('{"format": 1}')
    assert read_all(open_text([path], cache)) == [b"text"]


@pytest.mark.parametrize("tokenizer", ["bytes", "words"])
def test_a_long_line_takes_a_few_times_its_bytes(tokenizer, tmp_path, monkeypatch):
    """Lists of Python integers would take 8 to 36 bytes for each token. A piece is as small against the line as it is
    against lines that are long."""
    monkeypatch.setattr(data_tokenizer, "in_pieces", partial(data_tokenizer.in_pieces, size=1 << 16))
    size = 1_000_000
    name = tokenizer if tokenizer == "bytes" else save_words(tmp_path / "t", "?", "a", "b")
    text = "a b " * (size // 4)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    (tmp_path / "b.txt").write_text("a")
    open_text([tmp_path / "b.txt"], tmp_path / "cache", name)  # imports count for no line
    tracemalloc.start()
    corpus = open_text([tmp_path / "a.jsonl"], tmp_path / "cache", name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert corpus.total == (size if tokenizer == "bytes" else size // 2)
    assert peak < 9 * size


def limited(path: Path, cache: Path) -> str:
    """What is said where no file may grow beyond 64 KiB, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    try:
        open_text([path], cache)
    except ValueError as error:
        return str(error)
    return ""


def test_a_cache_that_is_full_is_named_and_keeps_no_half_store(tmp_path):
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("much " * 100_000)
    with get_context("fork").Pool(1) as pool:
        said = pool.apply(limited, (path, cache))
    assert said.startswith(f"data.cache='{cache}' cannot be used: File too large"), said
    assert not [left for left in cache.iterdir() if left.is_dir()]
    assert len(read_all(open_text([path], cache))[0]) == 500_000


def test_a_cache_that_can_only_be_read_serves_what_it_holds(tmp_path, monkeypatch):
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("text")
    first = open_text([path], cache)

    def sealed(path: Path):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(corpus_module, "_locked", sealed)
    assert open_text([path], cache).fingerprint == first.fingerprint
    path.write_text("other")
    with pytest.raises(ValueError, match=r"data\.cache=.* cannot be used: Read-only file system"):
        open_text([path], cache)


@pytest.mark.parametrize("place", ["file", "/proc/nothing", "/dev/full"])
def test_a_cache_that_cannot_be_made_is_named(place, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "a.txt").write_text("text")
    cache = tmp_path / place / "cache"
    with pytest.raises(ValueError, match=f"data.cache='{cache}' cannot be used: "):
        open_text([tmp_path / "a.txt"], cache)


def test_an_unfinished_store_is_written_again(tmp_path):
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("text")
    fingerprint = open_text([path], cache).fingerprint
    (cache / fingerprint / "store.json").unlink()
    (cache / fingerprint / "tokens.bin").write_bytes(b"te")
    assert read_all(open_text([path], cache)) == [b"text"]


def test_many_processes_at_once(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("shared " * 1000)
    with get_context("fork").Pool(4) as pool:
        found = pool.starmap(open_text, [([path], tmp_path / "cache")] * 4)
    assert all(read_all(corpus) == [b"shared " * 1000] for corpus in found)


def test_a_tokenizer_is_read_from_a_folder(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {"[UNK]": 0, "</s>": 1, **{f"w{i}": i + 2 for i in range(300)}}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>").save_pretrained(folder)
    (tmp_path / "a.txt").write_text("w0 w299 nonsense")
    corpus = open_text([tmp_path / "a.txt"], tmp_path / "cache", tokenizer=str(folder))
    assert corpus.read(0, 0, 4).tolist() == [2, 301, 0, 1]
    assert corpus.vocab_size == 302
    assert corpus.tokens.dtype == np.uint16


def test_files_that_cannot_be_read_are_named_with_their_line(tmp_path):
    with pytest.raises(ValueError, match=r"data.files: .*nothing.*matches no file"):
        matching_files([str(tmp_path / "nothing*")])
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"text": "x"}) + "\n" + json.dumps({"other": "x"}) + "\n")
    with pytest.raises(ValueError, match=r"data.text_field='text' .* line 2"):
        open_text([bad], tmp_path / "cache")
    bad.write_text('{"text": ')
    with pytest.raises(ValueError, match=r"line 1 of .*bad.jsonl is not JSON"):
        open_text([bad], tmp_path / "cache")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(ValueError, match="no text at all"):
        open_text([empty], tmp_path / "cache")
