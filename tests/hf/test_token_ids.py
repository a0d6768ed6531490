"""Ids that the model has no row for: every rank says the same, before anything is sent, and nobody waits."""

from typing import Any

import pytest
import torch

from ringattn import Documents, MeshShape
from ringattn.hf import parallelize, shard_batch, shard_trees
from ringattn.hf.tiny import read_config, tiny_config, tiny_model
from ringattn.hf.token_ids import Noted, Vocabulary, check_noted, in_rows
from ringattn.memory.settings import MemorySettings
from ringattn.trees import Targets, Trees
from tests.hf.families import FAMILIES
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

transformers = pytest.importorskip("transformers")
ROWS, SIZE = 2, 8


def batch_of(key: str, value: int) -> dict[str, torch.Tensor]:
    """Two rows of ids and labels, with one value in row 1, column 6."""
    ids = torch.arange(1, 1 + ROWS * SIZE).view(ROWS, SIZE)
    batch = {"input_ids": ids, "labels": ids.clone(), "shift_labels": ids.clone()}
    batch[key][1, 6] = value
    return batch if key == "shift_labels" else {name: batch[name] for name in ("input_ids", "labels")}


def said(kind: str, steps: int) -> tuple[str, ...]:
    """What this rank raises in the last of some steps, the others of which are good."""
    torch.set_num_threads(1)
    mesh = mesh_of(2, 1)
    model = tiny_model(tiny_config(read_config("llama"), **FAMILIES["llama"]))
    size = model.config.vocab_size
    parallelize(model, mesh, MemorySettings(loss_tile=8) if kind == "trees" else None)
    value = -7 if kind == "negative" else size
    key = "input_ids" if kind == "negative" else kind
    good = batch_of("labels", -100)
    try:
        for step in range(steps):
            last = step == steps - 1
            if kind == "trees":
                local = shard_trees(Trees([[1, 2, 3, 4], [1, 2, 3, value if last else 5]]), mesh)
            else:
                local = shard_batch(batch_of(key, value) if last else good, None, mesh)
            model(**local).loss.backward()
    except Exception as error:
        return type(error).__name__, str(error).replace(str(size - 1), "V-1").replace(str(size), "V")
    return ("nothing",)


PLACES = {
    "input_ids": "input_ids must hold ids from 0 to V-1, .* vocabulary has V, got V at input_ids[1, 6] (1 such of 16)",
    "negative": "input_ids must hold ids from 0 to V-1, .* vocabulary has V, got -7 at input_ids[1, 6] (1 such of 16)",
    "labels": "labels must hold .* or -100 where there is no target, got V at labels[1, 6]",
    "shift_labels": "shift_labels must hold .* got V at shift_labels[1, 6]",
    "trees": "the sequences of trees must hold ids .* got V at sequences[1][3]",
}


@pytest.mark.parametrize("steps", [1, 2])
def test_every_rank_names_the_worst_id_and_its_place(pool: Pools, steps: int) -> None:
    for kind, words in PLACES.items():
        first, second = pool(2).run(said, kind, steps)
        assert first == second
        assert first[0] == "ValueError", first
        for part in words.split(" .* "):
            assert part in first[1], first


def checked(batch: dict[str, Any], vocabulary: Vocabulary) -> None:
    check_noted(shard_batch(batch, None, MeshShape())["cu_seq_lens_q"], vocabulary, on_device=False)


def test_what_stands_for_something_else_is_no_fault() -> None:
    ids = torch.tensor([[5, 9, 9, 1]])
    checked({"input_ids": ids}, Vocabulary(6, 6, others=(9,)))
    with pytest.raises(ValueError, match=r"got 9 at input_ids\[0, 1\] \(2 such of 4\)"):
        checked({"input_ids": ids}, Vocabulary(6, 6))
    checked({"input_ids": ids}, Vocabulary(None, None))


def test_targets_that_nothing_predicts_do_not_count() -> None:
    """Labels of first tokens and of padding are targets of no token."""
    labels = torch.tensor([[99, 1, 2, 99, 3, 99]])
    batch = {"input_ids": torch.zeros(1, 6, dtype=torch.int64), "labels": labels}
    docs = Documents([3, 2], total=6)
    check_noted(shard_batch(batch, docs, MeshShape())["cu_seq_lens_q"], Vocabulary(6, 6), on_device=False)
    with pytest.raises(ValueError, match=r"labels must hold .* got 99 at labels\[0, 3\]"):
        checked(batch, Vocabulary(6, 6))


@pytest.mark.parametrize("kind", [torch.float32, torch.bool])
def test_ids_of_another_kind_are_refused(kind: torch.dtype) -> None:
    for key in ("input_ids", "labels"):
        batch = {"input_ids": torch.ones(1, 4, dtype=torch.int64), "labels": torch.ones(1, 4, dtype=torch.int64)}
        with pytest.raises(ValueError, match=f"{key} must be integers, got {kind}"):
            checked(batch | {key: batch[key].to(kind)}, Vocabulary(6, 6))


def test_one_row_is_named_by_its_column() -> None:
    noted = Noted(torch.tensor([1, -3, 8]), "input_ids", in_rows("input_ids", 3, 1))
    with pytest.raises(ValueError, match=r"got 8 at input_ids\[2\] \(2 such of 3\)"):
        Vocabulary(6, 6).check(noted)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "3", True, torch.tensor(-2.0), torch.tensor([3, 3])])
def test_what_a_loss_cannot_be_divided_by_is_refused(value: object) -> None:
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.int64), "labels": torch.ones(1, 4, dtype=torch.int64)}
    with pytest.raises(ValueError, match="num_items_in_batch must be a finite number >= 0"):
        shard_batch(batch | {"num_items_in_batch": value}, None, MeshShape())
    for good in (0, 3, 2.5, torch.tensor(3), torch.tensor([3])):
        assert shard_batch(batch | {"num_items_in_batch": good}, None, MeshShape())["num_items_in_batch"] is good


@pytest.mark.parametrize("value", [torch.tensor([0.0, 2.7, 4.0]), [0, 2.7, 4], [0, True, 4], [0, "2", 4]])
def test_cumulative_lengths_are_integers(value: object) -> None:
    with pytest.raises(ValueError, match="cu_seq_lens_q must be"):
        shard_batch({"input_ids": torch.ones(1, 4, dtype=torch.int64), "cu_seq_lens_q": value}, None, MeshShape())


@pytest.mark.parametrize("value", [[["a", "b"]], [[0], [0, 1]]])
def test_segment_ids_that_are_no_numbers_are_named(value: object) -> None:
    with pytest.raises(ValueError, match="segment_ids must be integers of shape"):
        shard_batch({"input_ids": torch.ones(1, 2, dtype=torch.int64), "segment_ids": value}, None, MeshShape())


def test_numbers_that_only_look_like_integers_are_refused() -> None:
    for lengths in ([1, 3.0], [1, True], "12", [1, None], torch.tensor([1.0, 3.0])):
        with pytest.raises(ValueError, match="lengths must be"):
            Documents(lengths)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="total must be an integer"):
        Documents([1], total=True)
    with pytest.raises(ValueError, match="labels must be integers"):
        Targets([0, 1], [1, True], [1, 1], 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tokens must be a number of rows >= 0, got 3\.0"):
        Targets([0, 1], [1, 2], [1, 1], 3.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"sequences\[0\] must be token ids in one row, got \[1, True, 3\]"):
        Trees([[1, True, 3]])
