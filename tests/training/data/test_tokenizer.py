"""Tokenizers: the same ids in pieces as at once, and known by what they do."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from ringattn.training.data.tokenizer import Tokenizer, has_tokenizer, in_pieces, load_tokenizer

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
LLAMA3 = WORDS + r"|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = [Path(__file__).read_text(), "one two  three\n\n four 1234567 été 日本語 don't\t\tx"]


def byte_level(pattern: str | None):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["</s>", "<|two words|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def sentence_pieces(scheme: str):
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def whole_text_bpe():
    """No words: merges over the whole text, with a mark before it, as the first Llamas have."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>", "<unk>"], show_progress=False)
    )
    return tokenizer


def word_pieces():
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["</s>", "<unk>"], show_progress=False)
    )
    return tokenizer


def stripping():
    """A normalizer that changes what is at the ends of a text: no cut leaves the ids as they are."""
    tokenizer = byte_level(None)
    tokenizer.normalizer = normalizers.Strip()
    return tokenizer


KINDS = {
    "gpt2": lambda: byte_level(None),
    "llama3": lambda: byte_level(LLAMA3),
    "unigram, first": lambda: sentence_pieces("first"),
    "unigram, always": lambda: sentence_pieces("always"),
    "whole text": whole_text_bpe,
    "word pieces": word_pieces,
    "stripping": stripping,
}


@pytest.fixture(scope="module", params=KINDS)
def encode(request):
    tokenizer = KINDS[request.param]()
    return lambda text: np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)


PARTS = ["word", "Another", "été", "日本語", " ", "  ", "\n", "\n\n", "\t", "1234567", "don't", "<|two words|>", "."]
PARTS += ["…", "e\u0301"]
words = st.lists(st.sampled_from(PARTS), max_size=120).map("".join)


@settings(max_examples=60)
@given(st.one_of(words, st.text(max_size=300)), st.integers(1, 60))
def test_pieces_have_the_ids_of_the_whole(encode, text, size):
    pieces = [ids for ids, _ in in_pieces(encode, text, size, margin=64)]
    found = np.concatenate(pieces) if pieces else np.zeros(0, np.int64)
    assert found.tolist() == encode(text).tolist()


def test_long_texts_are_cut_where_it_changes_nothing():
    tokenizer = byte_level(LLAMA3)
    sizes: list[int] = []

    def encode(text: str):
        sizes.append(len(text))
        return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    text = Path(__file__).read_text() * 40
    pieces = list(in_pieces(encode, text, 5000, margin=100))
    found = np.concatenate([ids for ids, _ in pieces])
    assert sum(characters for _, characters in pieces) == len(text)
    assert max(sizes) < 5200
    assert found.tolist() == encode(text).tolist()


def saved(folder: Path, tokenizer=None, **more) -> Path:
    tokenizer = tokenizer or byte_level(None)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **more)
    fast.save_pretrained(folder)
    return folder


def ids_of(tokenizer: Tokenizer, text: str):
    return np.concatenate([ids for ids, _ in tokenizer.pieces(text)])


def fingerprint(folder: Path, add_eos: bool = True) -> str:
    return load_tokenizer(str(folder), add_eos).fingerprint


def test_a_tokenizer_is_known_by_its_contents(tmp_path):
    folder = saved(tmp_path / "a")
    first = fingerprint(folder)
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    (copy / "README.md").write_text("a file that is not the tokenizer's")
    assert fingerprint(copy) == first
    assert fingerprint(folder, add_eos=False) != first
    content = json.loads((copy / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (copy / "tokenizer.json").write_text(json.dumps(content))
    assert fingerprint(copy) != first


def test_texts_end_with_the_token_for_it(tmp_path):
    folder = saved(tmp_path / "a")
    for add_eos in (True, False):
        ids = ids_of(load_tokenizer(str(folder), add_eos), "two words")
        assert (ids[-1] == 0) == add_eos


def test_the_vocabulary_ends_with_the_highest_id_also_where_ids_have_gaps(tmp_path):
    """Token 70,000 in a vocabulary of four does not fit 16 bits, and not a model of four either."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 70_000}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    found = load_tokenizer(str(saved(tmp_path / "a", tokenizer)), False)
    assert found.vocab_size == 70_001
    assert found.dtype == np.uint32
    assert ids_of(found, "a b").tolist() == [2, 70_000]


def break_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": ')


def name_another_class(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "NobodysTokenizer"}')


def bring_code(folder: Path) -> None:
    """Code of its own would be asked about on a terminal that nobody sits at, and is never run."""
    (folder / "tokenizer.json").unlink()
    (folder / "own.py").write_text("raise SystemExit('run')")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.Own", null]}}')


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("damage", [break_json, name_another_class, bring_code, empty])
def test_a_tokenizer_that_cannot_be_read_is_named(damage, tmp_path):
    folder = saved(tmp_path / "a")
    damage(folder)
    with pytest.raises(ValueError, match=r"data\.tokenizer='.*/a' cannot be read: \w+") as error:
        load_tokenizer(str(folder), True)
    assert "\n" not in str(error.value)


def test_what_holds_a_tokenizer(tmp_path):
    assert has_tokenizer(str(saved(tmp_path / "a")))
    assert not has_tokenizer(str(tmp_path))
