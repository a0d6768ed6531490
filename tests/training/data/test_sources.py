"""Sources: every kind of file gives the same documents; the cache is made once; bad input is named, or counted."""

import bz2
import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import datasets
import pyarrow
import pyarrow.parquet
from omegaconf import OmegaConf

from ringattn.training.data import loading as loading_module
from ringattn.training.data.encoding import Encoding
from ringattn.training.data.loading import Loader, document_digests
from ringattn.training.data.records import records_of
from ringattn.training.data.source_store import digest_of, open_source
from ringattn.training.data.sources import sources_of
from ringattn.training.data.workers import outcomes
from ringattn.training.packs.packing import read_pack
from tests.training.chat_tokenizers import TALK, chat_tokenizer
from tests.training.forked import ROOT
from tests.training.recipe import prepared

TEXTS = ["one é", "two\ntwo", "three"]


def written(folder: Path, kind: str) -> str:
    """The path of a source that holds TEXTS."""
    lines = "".join(json.dumps({"text": text, "more": 1}) + "\n" for text in TEXTS).encode()
    table = pyarrow.table({"text": TEXTS, "more": [1, 2, 3]})
    path = folder / f"a.{kind}"
    if kind == "jsonl":
        path.write_bytes(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif kind == "jsonl.xz":
        path.write_bytes(lzma.compress(lines))
    elif kind == "jsonl.bz2":
        path.write_bytes(bz2.compress(lines))
    elif kind in ("jsonl.zst", "jsonl.lz4"):
        with pyarrow.output_stream(str(path), compression="zstd" if kind.endswith("zst") else "lz4") as out:
            out.write(lines)
    elif kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    elif kind == "saved":
        datasets.Dataset(table).save_to_disk(path)
    elif kind == "saved parts":
        datasets.DatasetDict({"train": datasets.Dataset(table), "test": datasets.Dataset(table)}).save_to_disk(path)
    else:
        path.mkdir()
        for number, text in enumerate(TEXTS):
            (path / f"{number}.txt").write_text(text)
        (path / "2.txt").unlink()
        (path / "2.txt.gz").write_bytes(gzip.compress(TEXTS[2].encode()))
    return str(path)


def loader(tmp_path: Path, **data) -> Loader:
    values = {"cache": str(tmp_path / "cache"), "processes": 1, "validation": None} | data
    return Loader(OmegaConf.create(values), (), lambda tokens: None)


def opened(tmp_path: Path, source: dict, **data):
    """The mixture of one source."""
    return loader(tmp_path, **data).mixture(sources_of([source]))


def texts_of(corpus) -> list[str]:
    return [bytes(corpus.read(one, 0, corpus.length(one)).astype(np.uint8)).decode() for one in range(len(corpus))]


KINDS = ["jsonl", "jsonl.gz", "jsonl.xz", "jsonl.bz2", "jsonl.zst", "jsonl.lz4", "parquet", "saved", "saved parts", "d"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_documents(kind, tmp_path):
    source = {"path": written(tmp_path, kind)}
    corpus = opened(tmp_path, source)
    assert texts_of(corpus) == TEXTS
    assert opened(tmp_path, source).fingerprint == corpus.fingerprint
    streamed = loader(tmp_path).stream(sources_of([source]))
    found = set()
    cursor = streamed.cursor(0, 0, (0,))
    for _ in range(3):
        document, length, _ = cursor.peek()
        found.add(bytes(streamed.read(document, 0, length).astype(np.uint8)).decode())
        cursor.take(length)
    assert found == set(TEXTS)


def test_a_data_set_is_found_by_its_name(tmp_path, monkeypatch):
    """Online a name on the hub; here the folder of one, which `datasets` loads alike."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (tmp_path / "owner").mkdir()
    source = {"hub": str(Path(written(tmp_path / "owner", "jsonl")).parent), "split": "train"}
    assert texts_of(opened(tmp_path, source)) == TEXTS
    streamed = loader(tmp_path).stream(sources_of([source]))
    document, length, _ = streamed.cursor(0, 0, (0, 0, 1)).peek()
    assert bytes(streamed.read(document, 0, length).astype(np.uint8)).decode() == TEXTS[1]
    with pytest.raises(ValueError, match=r"data\.sources\[0\]: the data set .*nowhere.* cannot be loaded"):
        opened(tmp_path, {"hub": str(tmp_path / "nowhere")})


def test_records_go_on_at_any_number(tmp_path):
    for kind in ("jsonl", "jsonl.gz", "parquet", "saved"):
        path = Path(written(tmp_path, kind))
        whole = [(one.number, one.value) for one in records_of(path, "text") if one.value]
        for start in range(4):
            found = [(one.number, one.value) for one in records_of(path, "text", start) if one.value]
            assert found == whole[start:]


def test_ids_come_with_their_own_mask(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"input_ids": [5, 70000, 7], "learn": [0, 1, 0]}, {"input_ids": [1, 2], "learn": [1, 1]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = opened(tmp_path, {"path": str(path), "kind": "ids", "mask_field": "learn"})
    assert corpus.read(0, 0, 3).tolist() == [5, 70000, 7]
    assert corpus.learned(0, 0, 3).tolist() == [False, True, False]
    assert corpus.vocab_size == 70001
    plain = opened(tmp_path, {"path": str(path), "kind": "ids"})
    assert plain.learned(0, 0, 3) is None
    assert plain.fingerprint != corpus.fingerprint


def test_chats_are_learned_where_the_assistant_speaks(tmp_path):
    chat_tokenizer("qwen3").save_pretrained(tmp_path / "t")
    path = tmp_path / "a.jsonl"
    rows = [{"messages": TALK}, {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(path), "kind": "chat"}
    corpus = opened(tmp_path, source, tokenizer=str(tmp_path / "t"))
    masks = [corpus.learned(one, 0, corpus.length(one)) for one in range(2)]
    assert all(0 < mask.sum() < len(mask) for mask in masks)
    every = opened(tmp_path, source, tokenizer=str(tmp_path / "t"), loss_on="all")
    assert every.learned(0, 0, 3) is None
    assert every.fingerprint != corpus.fingerprint


@pytest.mark.slow
def test_processes_give_what_one_does_and_end_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr("ringattn.training.data.workers.CHUNK", 3)
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"text {number}"}) if number != 7 else "{" for number in range(20)]
    path.write_text("\n".join(lines))
    alone = list(outcomes(records_of(path, "text"), Encoding("text", "text"), 1))
    together = list(outcomes(records_of(path, "text"), Encoding("text", "text"), 3))
    assert [one.error for one in together] == [one.error for one in alone]
    assert "line 8 of" in alone[7].error
    assert [one.encoded and one.encoded[0].tolist() for one in together] == [
        one.encoded and one.encoded[0].tolist() for one in alone
    ]
    with pytest.raises(ValueError, match="no chat template"):
        list(outcomes(records_of(path, "text"), Encoding("chat", "text"), 2))


# --- the cache


def test_the_cache_is_made_once_and_again_where_it_is_damaged(tmp_path, capsys):
    source = {"path": written(tmp_path, "jsonl")}
    corpus = opened(tmp_path, source)
    folder = tmp_path / "cache" / corpus.parts[0].corpus.fingerprint
    assert "tokenized 3 documents" in capsys.readouterr().out
    opened(tmp_path, source)
    assert "tokenized" not in capsys.readouterr().out
    data = bytearray((folder / "tokens.bin").read_bytes())
    data[2] ^= 1
    (folder / "tokens.bin").write_bytes(data)
    assert texts_of(opened(tmp_path, source)) == TEXTS
    assert "tokens.bin is not what was written" in capsys.readouterr().err
    (folder / "store.json").unlink()  # as after a kill
    assert texts_of(opened(tmp_path, source)) == TEXTS


def test_another_file_tokenizer_or_rule_is_another_cache(tmp_path):
    source = {"path": written(tmp_path, "jsonl")}
    first = opened(tmp_path, source).fingerprint
    moved = (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    assert opened(tmp_path, {"path": str(moved)}).fingerprint == first
    assert opened(tmp_path, {"path": str(moved), "weight": 2}).fingerprint != first
    assert opened(tmp_path, {"path": str(moved), "max_tokens": 7}).fingerprint != first
    moved.write_text('{"text": "other"}\n')
    assert opened(tmp_path, {"path": str(moved)}).fingerprint != first


def test_many_processes_at_once(tmp_path):
    source = {"path": written(tmp_path, "jsonl")}
    with get_context("fork").Pool(3) as pool:
        found = pool.starmap(opened, [(tmp_path, source)] * 3)
    assert all(texts_of(corpus) == TEXTS for corpus in found)
    assert len({corpus.fingerprint for corpus in found}) == 1


def test_a_file_that_changes_while_it_is_tokenized_leaves_no_store_behind(tmp_path, monkeypatch):
    """Its tokens would be found again, for what the file held before, once it holds that again."""
    path = Path(written(tmp_path, "jsonl"))
    before = path.read_bytes()

    def changing(*arguments: object):
        path.write_text('{"text": "other"}\n')
        return outcomes(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr("ringattn.training.data.source_store.outcomes", changing)
        with pytest.raises(ValueError, match="was changed while it was read"):
            opened(tmp_path, {"path": str(path)})
    path.write_bytes(before)
    assert texts_of(opened(tmp_path, {"path": str(path)})) == TEXTS


def test_a_full_disk_is_named_and_keeps_no_half_store(tmp_path, monkeypatch):
    def full(*_: object):
        raise OSError(28, "No space left on device")

    source = {"path": written(tmp_path, "jsonl")}
    monkeypatch.setattr("ringattn.training.data.source_store.np.save", full)
    with pytest.raises(ValueError, match=r"data\.cache=.* cannot be used: No space left"):
        opened(tmp_path, source)
    assert not [one for one in (tmp_path / "cache").iterdir() if one.is_dir()]


def test_a_cache_that_can_only_be_read_serves_what_it_holds(tmp_path, monkeypatch):
    source = {"path": written(tmp_path, "jsonl")}
    first = opened(tmp_path, source).fingerprint

    def sealed(path: Path):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(loading_module, "_locked", sealed)
    assert opened(tmp_path, source).fingerprint == first
    Path(source["path"]).write_text('{"text": "other"}\n')
    with pytest.raises(ValueError, match="Read-only file system"):
        opened(tmp_path, source)


@pytest.mark.slow
def test_a_kill_while_tokenizing_leaves_a_cache_that_is_made_anew(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number} " * 2000}) + "\n" for number in range(3000)))
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.training.data.test_sources import opened\n"
        "opened(Path(sys.argv[1]), {'path': sys.argv[2]}, processes=2)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path), str(path)]
    for wait in (0.2, 1.0):
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        while process.poll() is None and not list((tmp_path / "cache").glob("*/tokens.bin")):
            time.sleep(0.02)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
    corpus = opened(tmp_path, {"path": str(path)})
    assert len(corpus) == 3000
    assert texts_of(corpus)[-1] == "2999 " * 2000
    assert open_source(tmp_path / "cache" / corpus.parts[0].corpus.fingerprint) is not None


# --- bad input


BAD = [
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 of .*a.jsonl: it is not JSON"),
    ("a.jsonl", b'{"text": "x"}\n{"other": "y"}\n', "line 2 of .*a.jsonl: it has no 'text'; it has 'other'"),
    ("a.jsonl", b'{"text": "x"}\n{}\n', "line 2 of .*a.jsonl: it has no 'text'; it has no keys"),
    ("a.jsonl", b'{"text": "x"}\n[1]\n', "line 2 of .*a.jsonl: it must be an object"),
    ("a.jsonl", b'{"text": "x"}\n{"text": 5}\n', "line 2 of .*a.jsonl: 'text' must be text, it is int"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', "line 2 of .*a.jsonl: it is not UTF-8: 0xe9 at byte"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\\ud800"}\n', "line 2 of .*a.jsonl: half a surrogate"),
    ("b.txt", b"caf\xe9", "b.txt: it is not UTF-8: 0xe9 at byte 3; convert it, as in iconv"),
    ("b.txt", b"a\x00b", "b.txt: byte 1 is 0: binary"),
    ("b.txt", b"", "b.txt: the file is empty"),
    ("b.png", b"\x89PNG\r\n", "b.png: .* holds PNG, not text"),
    ("b.txt", "text".encode("utf-16"), "b.txt: .* holds UTF-16 text"),
    ("b.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-12], "b.jsonl.gz: "),
    ("b.jsonl.gz", b"no gzip", "b.jsonl.gz: Not a gzipped file"),
    ("b.jsonl.zst", b"no zstd at all", "b.jsonl.zst: "),
    ("b.parquet", b"PAR1 and no more", "b.parquet: "),
    ("b.arrow", b"table", "b.arrow: .* is a table by its name, not text: if `datasets` saved it, name its folder"),
    ("b.jsonl", b'{"text": null}\n', "line 1 of .*b.jsonl: 'text' is null"),
    ("b.jsonl", b"", "b.jsonl: the file is empty"),
]


@pytest.mark.parametrize(("name", "data", "words"), BAD, ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_bad_files_stop_or_are_counted(name, data, words, tmp_path):
    """Beside a good file."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "good.jsonl").write_text('{"text": "good"}\n')
    (tmp_path / "data" / name).write_bytes(data)
    source = {"path": str(tmp_path / "data")}
    with pytest.raises(ValueError, match=rf"data\.sources\[0\]: .*{words}") as error:
        opened(tmp_path, source)
    assert "data.on_error=skip" in str(error.value)
    assert "\n" not in str(error.value)
    corpus = opened(tmp_path, source, on_error="skip")
    assert "good" in texts_of(corpus)
    assert len(corpus.notes) == 1
    assert ": 1 records were passed over, the first: " in corpus.notes[0]
    streamed = loader(tmp_path, on_error="skip").stream(sources_of([source]))
    cursor = streamed.cursor(0, 0, (0,))
    for _ in range(len(corpus)):
        cursor.take(cursor.peek()[1])
    cursor.peek()
    assert streamed.skipped >= 1


def test_nothing_but_bad_records_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n{\n")
    source = {"path": str(tmp_path / "a.jsonl")}
    with pytest.raises(
        ValueError, match=r"holds nothing that can be used: 2 records were passed over, the first: line"
    ):
        opened(tmp_path, source, on_error="skip")
    with pytest.raises(ValueError, match=r"'a\.jsonl' holds no document: records were passed over, the first: line 1"):
        loader(tmp_path, on_error="skip").stream(sources_of([source])).cursor(0, 0, (0,)).peek()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"input_ids": "abc"}, "'input_ids' must be a list of integers, it is str"),
        ({"input_ids": [1.5]}, "'input_ids' must be a list of integers, it holds"),
        ({"input_ids": [[1], [2, 3]]}, "'input_ids' must be a list of integers, it holds"),
        ({"input_ids": [-1]}, "'input_ids' must hold integers from 0"),
        ({"input_ids": [1, 2], "m": [1]}, "'m' has 1 entries for the 2 ids"),
        ({"input_ids": [1], "m": [2]}, "'m' must hold integers from 0 to 1"),
        ({"input_ids": [1]}, "it has no 'm'"),
    ],
)
def test_bad_ids_are_named(row, words, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=f"line 1 of .*: {words}"):
        opened(tmp_path, {"path": str(tmp_path / "a.jsonl"), "kind": "ids", "mask_field": "m"})


# --- the configuration


def listed(tmp_path: Path, sources: str, *more: str) -> list[str]:
    cache = f"data.cache={tmp_path / 'cache'}"
    return ["data=sources", f"data.sources={sources}", cache, f"run.output={tmp_path / 'out'}", "data.seq_len=8", *more]


@pytest.mark.parametrize(
    ("sources", "more", "words"),
    [
        ("[]", [], "data.sources is empty"),
        ("5", [], "data.sources must be a list, got 5"),
        ("[{kind: text}]", [], r"data.sources\[0\] must have either `path` or `hub`"),
        ("[{path: F, hub: x}]", [], "either `path` or `hub`"),
        ("[{path: F, kind: movie}]", [], "kind must be one of text, ids, chat, got 'movie'"),
        ("[{path: F, weigth: 1}]", [], "has no key weigth; there are path"),
        ("[{path: F, weight: -1}]", [], "weight must be a positive finite number, got -1"),
        ("[{path: F, epochs: 0}]", [], "epochs must be an integer of at least 1, got 0"),
        ("[{path: F, max_tokens: 1.5}]", [], "max_tokens must be an integer"),
        ("[{path: F, mask_field: m}]", [], "mask_field is of kind=ids"),
        ("[{path: F, weight: 1}, {path: F, name: b}]", [], "some sources have a weight"),
        ("[F, F]", [], "the name of two sources"),
        ("[/no/such/file]", [], r"data.sources\[0\].path: '/no/such/file' matches no file"),
        ("[{path: F, split: train}]", [], "split is of a data set"),
        ("[{path: F, epochs: 2}]", ["run.steps=99"], "run.steps=99 take 792 tokens, and the sources .* have 26"),
        ("[{path: F, max_tokens: 1}]", [], "max_tokens=1 is less than the first document"),
        ("[{path: F, kind: chat}]", [], "data.tokenizer=bytes has no chat template"),
        ("[F]", ["data.loss_on=user"], "data.loss_on must be one of assistant, all, got 'user'"),
        ("[F]", ["data.on_error=maybe"], "data.on_error must be one of stop, skip"),
        ("[F]", ["data.packing=best"], "data.packing must be one of order, best_fit, got 'best'"),
        ("[F]", ["data.lookahead=5"], "data.lookahead is of data.packing=best_fit"),
        ("[F]", ["data.packing=best_fit", "data.lookahead=0"], "data.lookahead must be an integer of at least 1"),
        ("[F]", ["data.processes=0"], "data.processes must be an integer of at least 1"),
        ("[F]", ["data.curriculum=5"], r"data.curriculum must be a list .*write data.curriculum=\[\[0, 8192\]"),
        ("[F]", ["data.curriculum=[[1, 8]]"], "begins with step 0"),
        ("[F]", ["data.curriculum=[[0, 8], [0, 9]]"], "steps in order"),
        ("[F]", ["data.curriculum=[[0, 8, 1]]"], "pairs of a step and a length"),
        ("[F]", ["data.curriculum=[[0, 8]]", "data.delay=1", "data.packs_per_step=2"], "use one of them"),
        ("[F]", ["data.packing=best_fit", "data.delay=1", "data.packs_per_step=2"], "two rules to fill packs"),
        ("[F]", ["data.streaming=true", "data.delay=1", "data.packs_per_step=2"], "needs the lengths of all documents"),
        ("[F, {path: F, name: b}]", ["data.streaming=true"], "give each of them a weight"),
        ("[F]", ["data.chat_template=5"], "data.chat_template must be a file"),
        ("[F]", ["data.tokenizer=/no/such"], "data.tokenizer='/no/such' must be"),
        ("[F]", ["data.validation=[{path: F, weight: 1}]"], r"data.validation\[0\] is read once and whole"),
        ("[F]", ["data.validation=[/no/such]"], r"data.validation\[0\].path: '/no/such' matches no file"),
        ("[{path: F, kind: ids}]", [], "it has no 'input_ids'; it has 'text'"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_one_line_names_the_key(sources, more, words, tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"text": "some words!!"}\n{"text": "x"}\n')
    overrides = [one.replace("F", str(path)) for one in listed(tmp_path, sources, *more)]
    with pytest.raises(ValueError, match=words) as error:
        prepared(*overrides)
    assert "\n" not in str(error.value)


def test_ids_beyond_the_embedding_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"input_ids": [5, 300]}\n')
    words = (
        r"data\.sources\[0\]: .*vocab_size=256 is less than the 301 tokens of its ids: 300 stands at 1 of document 1;"
    )
    with pytest.raises(ValueError, match=words):
        prepared(*listed(tmp_path, f"[{{path: {tmp_path / 'a.jsonl'}, kind: ids}}]"))
    job = prepared(*listed(tmp_path, f"[{{path: {tmp_path / 'a.jsonl'}, kind: ids}}]", "data.streaming=true"))
    with pytest.raises(ValueError, match=r"line 1 of .*: id 300 is not below the model's 256"):
        job.corpus.cursor(0, 0, (0,)).peek()


def test_memory_is_planned_for_the_longest_packs_of_a_curriculum(tmp_path):
    path = written(tmp_path, "jsonl")
    job = prepared(*listed(tmp_path, f"[{path}]", "data.curriculum=[[0, 8], [5, 32], [9, 16]]"))
    assert job.cfg.data.seq_len == 32
    assert prepared(*listed(tmp_path, f"[{path}]", "data.seq_len=32")).plan.items == job.plan.items


def test_held_out_documents_that_are_trained_on_are_told(tmp_path):
    path = written(tmp_path, "jsonl")
    held_out = tmp_path / "held.jsonl"
    held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in (TEXTS[1], "unseen")))
    job = prepared(*listed(tmp_path, f"[{path}]", f"data.validation=[{{path: {held_out}, name: books}}]"))
    assert texts_of(job.validation["books"]) == [TEXTS[1], "unseen"]
    assert any("1 of the 2 documents of 'books' are also in the training data" in note for note in job.notes)
    held_out.write_text('{"text": "unseen"}\n')
    job = prepared(*listed(tmp_path, f"[{path}]", f"data.validation=[{held_out}]"))
    assert not any("validation" in note for note in job.notes)
    assert document_digests(job.corpus).tolist() == [
        digest_of(job.corpus.read(one, 0, job.corpus.length(one))) for one in range(len(job.corpus))
    ]
    assert document_digests(job.corpus).tolist() != document_digests(job.validation["held.jsonl"]).tolist()


def test_what_is_passed_over_of_held_out_documents_is_told_at_every_start(tmp_path):
    path, held_out = written(tmp_path, "jsonl"), tmp_path / "held.jsonl"
    held_out.write_text('{"text": "unseen"}\n{"no": 1}\n')
    for _ in range(2):
        job = prepared(*listed(tmp_path, f"[{path}]", f"data.validation=[{held_out}]", "data.on_error=skip"))
        assert any("held.jsonl: 1 records were passed over, the first: line 2 of" in note for note in job.notes)


def test_documents_longer_than_a_pack_are_told_where_they_would_stay_whole(tmp_path):
    job = prepared(*listed(tmp_path, f"[{written(tmp_path, 'jsonl')}]", "data.pad=true", "data.seq_len=5"))
    assert any("2 documents are longer than a pack of 5 tokens" in note for note in job.notes)


def test_the_loss_counts_what_is_learned(tmp_path):
    chat_tokenizer("gemma").save_pretrained(tmp_path / "t")
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    own = listed(tmp_path, f"[{{path: {tmp_path / 'a.jsonl'}, kind: chat}}]", f"data.tokenizer={tmp_path / 't'}")
    job = prepared(*own, "model.config.vocab_size=320", "data.seq_len=200")
    from ringattn.training.packs.packing import Packer

    pack = read_pack(Packer(job.corpus, 200, 0).next(), job.corpus)
    mask = job.corpus.learned(0, 0, job.corpus.length(0))
    whole = 200 // job.corpus.length(0)
    assert pack.targets == int((pack.labels != -100).sum())
    assert pack.targets >= whole * mask[1:].sum() > 0
