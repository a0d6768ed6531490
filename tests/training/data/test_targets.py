"""Token ids are integers and nothing else, and a source without a single target is refused before it is trained on."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import hypothesis.strategies as st
from hypothesis import given
from omegaconf import OmegaConf

from ringattn.training.data.corpus import Corpus
from ringattn.training.data.encoding import Encoding
from ringattn.training.data.json_lines import parsed
from ringattn.training.data.loading import Loader, load_validation
from ringattn.training.data.mixture import MixedCorpus
from ringattn.training.data.sources import sources_of
from ringattn.training.data.streaming import StreamedCorpus
from ringattn.training.data.targets import targets_of
from tests.training.recipe import prepared


def loader(folder: Path, **data: object) -> Loader:
    values = {"cache": str(folder / "cache"), "processes": 1, "validation": None} | data
    return Loader(OmegaConf.create(values), (), lambda tokens: None)


def lines(folder: Path, *records: object) -> dict[str, str]:
    """A source of pre-tokenized records."""
    path = folder / "ids.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {"path": str(path), "kind": "ids", "mask_field": "mask"}


def mixed(folder: Path, source: dict[str, str], **data: object) -> MixedCorpus:
    return loader(folder, **data).mixture(sources_of([source]))


def streamed(folder: Path, source: dict[str, str], **data: object) -> StreamedCorpus:
    return loader(folder, **data).stream(sources_of([source]))


@pytest.mark.parametrize("ids", [[1, True, 3], [True, False], [4, False], [1, 2.0], ["1"], [1, None]])
def test_ids_are_integers(ids: list[object]) -> None:
    with pytest.raises(ValueError, match="'input_ids' must be a list of integers, it h"):
        Encoding("ids", "input_ids").build()({"input_ids": ids})


def test_ids_that_are_no_integers_are_named_with_their_place(tmp_path: Path) -> None:
    source = lines(tmp_path, {"input_ids": [1, 2], "mask": [1, 1]}, {"input_ids": [1, True], "mask": [1, 1]})
    with pytest.raises(ValueError, match=r"line 2 of .*'input_ids' must be a list of integers, it has true at 1"):
        mixed(tmp_path, source)


def test_masks_may_be_true_and_false() -> None:
    encode = Encoding("ids", "input_ids", "mask").build()
    for mask in ([True, False, True], [1, 0, 1], np.array([True, False, True])):
        _, learned = encode({"input_ids": [5, 6, 7], "mask": mask})
        assert learned is not None
        assert learned.tolist() == [True, False, True]


@pytest.mark.parametrize("mask", [[0, 0, 0], [1, 0, 0]])
def test_a_source_without_a_target_is_refused(mask: list[int], tmp_path: Path) -> None:
    """A first token is predicted by nothing, so that learning it alone is learning nothing."""
    source = lines(tmp_path, {"input_ids": [5, 6, 7], "mask": mask}, {"input_ids": [5], "mask": [1]})
    words = r"data\.sources\[0\]: none of the 2 documents of 'ids\.jsonl' has a target: that takes a 1 in 'mask' behind"
    with pytest.raises(ValueError, match=words):
        mixed(tmp_path, source)
    cursor = streamed(tmp_path, source).cursor(0, 0, (0,))
    for _ in range(2):
        found = cursor.peek()
        assert found is not None
        cursor.take(found[1])
    with pytest.raises(ValueError, match=r"none of the documents of 'ids\.jsonl' has a target"):
        cursor.peek()


def test_validation_without_a_target_is_refused(tmp_path: Path) -> None:
    source = lines(tmp_path, {"input_ids": [5, 6, 7], "mask": [1, 0, 0]})
    with pytest.raises(
        ValueError, match=r"data\.validation\[0\]: none of the 1 documents of 'ids\.jsonl' has a target"
    ):
        load_validation(loader(tmp_path, validation=[source]))


def test_documents_without_a_target_are_told_once(tmp_path: Path) -> None:
    source = lines(
        tmp_path,
        {"input_ids": [5, 6, 7], "mask": [0, 1, 0]},
        {"input_ids": [5, 6], "mask": [1, 0]},
        {"input_ids": [], "mask": []},
        {"input_ids": [5, 6], "mask": [0, 1]},
    )
    (note,) = mixed(tmp_path, source).notes
    assert note.startswith("ids.jsonl: 2 of 4 documents have no target: that takes a 1 in 'mask' behind the first")
    cursor = streamed(tmp_path, source).cursor(0, 0, (0,))
    for _ in range(7):  # through two passes
        found = cursor.peek()
        assert found is not None
        cursor.take(found[1])


def test_texts_of_one_byte_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    data = ("data=text", f"data.files=[{tmp_path}/a.txt]", f"data.cache={tmp_path}/cache")
    with pytest.raises(ValueError, match=r"data\.files: none of the 1 documents has two tokens or more"):
        prepared(*data, f"run.output={tmp_path}/run")


@given(st.lists(st.lists(st.booleans(), max_size=6), max_size=6))
def test_targets_are_what_is_learned_behind_the_first_token(masks: list[list[bool]]) -> None:
    flat = np.array([one for mask in masks for one in mask], np.uint8)
    offsets = np.cumsum([0, *map(len, masks)], dtype=np.int64)
    for mask, expected in ((flat, [sum(one[1:]) for one in masks]), (None, [max(len(one) - 1, 0) for one in masks])):
        corpus = Corpus(np.zeros(len(flat), np.uint8), offsets, 1, "", mask)
        assert targets_of(corpus).tolist() == expected


@pytest.mark.parametrize("line", [b'{"text": "a", "text": "b"}', b'{"messages": [{"role": "user", "role": "x"}]}'])
def test_a_key_that_stands_twice_is_refused(line: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"an object has the key '(text|role)' twice"):
        parsed(line)
    (tmp_path / "a.jsonl").write_bytes(line)
    with pytest.raises(ValueError, match=r"line 1 of .*an object has the key '(text|role)' twice"):
        mixed(tmp_path, {"path": str(tmp_path / "a.jsonl")})
