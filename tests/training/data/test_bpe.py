"""A tokenizer that is trained here: any text, the same ids twice, as transformers loads it; `ringattn corpus`."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from ringattn.cli import main
from ringattn.training.data.bpe import END, LEAST, train_bpe
from ringattn.training.data.tokenizer import load_tokenizer, saved_tokenizer
from ringattn.training.evaluation.haystack import encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    assert train_bpe(["the sum of the sums", "some of the sum"] * 5, folder, 265) == 265
    return folder


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(folder: Path, text: str) -> None:
    model = saved_tokenizer(str(folder))
    ids = encoder(load_tokenizer(str(folder), add_eos=False))(text)
    assert max(ids, default=0) < 265
    assert model.decode(ids.tolist()) == text


def test_documents_end_with_its_token(folder: Path) -> None:
    ids = encoder(load_tokenizer(str(folder), add_eos=True))("the sum")
    assert saved_tokenizer(str(folder)).convert_ids_to_tokens(int(ids[-1])) == END
    assert len(ids) < len("the sum")


def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"at least {LEAST}, .* got 256"):
        train_bpe(["a"], tmp_path, 256)
    assert train_bpe(["a"], tmp_path, 9999) == LEAST  # nothing to be joined


def test_every_word_of_a_corpus_is_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = []
    for name in ("a", "b"):
        assert main(["corpus", f"{name}.jsonl", "--words", "30000", "--tokenizer", name]) == 0
        files.append((tmp_path / name / "tokenizer.json").read_bytes())
    assert files[0] == files[1]
    encode = encoder(load_tokenizer("a", add_eos=False))
    texts = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert all(len(encode(text)) == len(text.split()) for text in texts[:50])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--vocabulary", "200"], "--vocabulary: expected at least 257, got 200"),
        (["--tokenizer", "here"], "--tokenizer: expected a folder, got the file 'here'"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_written(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").touch()
    with pytest.raises(SystemExit):
        main(["corpus", "c.jsonl", "--words", "100", "--tokenizer", "t", *options])
    assert words in capsys.readouterr().err
    assert not (tmp_path / "c.jsonl").exists()
