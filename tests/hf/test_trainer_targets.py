"""The Trainer refuses ids that the model has no row for, and labels that teach nothing, on all ranks alike."""

from pathlib import Path

import pytest

from tests.hf.trainer_runs import failure, make_rows, mesh, trainer_of
from tests.pool import Pools

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate (pip install 'ringattn[hf]')")


def beyond(folder: str, data: int, ring: int, key: str, value: int, evaluation: bool) -> str:
    """What is said of a row, the first of two, with a value that is no id of the model."""
    rows = [{name: list(values) for name, values in row.items()} for row in make_rows(2)]
    rows[0][key][3] = value
    changes = {"train_sampling_strategy": "sequential"}
    trainer = trainer_of(mesh(data, ring), folder, changes, train_dataset=rows, eval_dataset=rows)
    return failure(trainer.evaluate if evaluation else trainer.train)


@pytest.mark.parametrize(("key", "value", "evaluation"), [("input_ids", 10**6, False), ("labels", -5, True)])
def test_ids_beyond_the_vocabulary_are_named_on_every_rank(
    pool: Pools, key: str, value: int, evaluation: bool, tmp_path: Path
) -> None:
    """Ranks of a sequence say the same; another replica says whose row it is, and does not wait for it."""
    words = f"ValueError: {key} must hold ids from 0 to "
    for told in pool(2).run(beyond, str(tmp_path), 1, 2, key, value, evaluation):
        assert told.startswith(words)
        assert f"got {value} at {key}[0, 3] (1 such of " in told
    first, second = pool(2).run(beyond, str(tmp_path), 2, 1, key, value, evaluation)
    assert first.startswith(words)
    assert second.startswith(f"RuntimeError: rank 0 could not read its batch: {words}")


def unlearned(folder: str, steps: int) -> str:
    """What is said of rows without a target behind the first `steps` ones."""
    rows = [dict(row) for row in make_rows(4)]
    for row in rows[2 * steps :]:  # a label of the first token is the target of none
        row["labels"] = [5] + [-100] * (len(row["labels"]) - 1)
    changes = {"train_sampling_strategy": "sequential"}
    return failure(trainer_of(mesh(2, 1), folder, changes, train_dataset=rows).train)


def test_labels_that_are_all_ignored_are_refused_at_the_first_step(pool: Pools, tmp_path: Path) -> None:
    for told in pool(2).run(unlearned, str(tmp_path), 0):
        assert told.startswith("ValueError: the first step has nothing to learn: labels are -100 for every token")
    assert pool(2).run(unlearned, str(tmp_path), 1) == ["none", "none"]
