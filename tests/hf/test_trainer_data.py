"""The Trainer's data: each row once over the replicas, equal batches on the ranks of a sequence, counts of tokens."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate (pip install 'ringattn[hf]')")

from tests.hf.trainer_runs import (
    Rows,
    Stream,
    history,
    mesh,
    same_history,
    trainer_of,
)
from tests.pool import Pools


def trained(folder: str, data: int, ring: int, rows: int, stream: bool, changes: dict[str, Any]) -> dict[str, Any]:
    set_ = (Stream if stream else Rows)(rows)
    trainer = trainer_of(mesh(data, ring), folder, changes, train_dataset=set_)
    trainer.train()
    return history(trainer)


UNEVEN: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "5 rows": (5, False, {"num_train_epochs": 2}),
    "accumulation": (5, False, {"gradient_accumulation_steps": 2, "num_train_epochs": 2}),
    "7 rows, accumulation": (7, False, {"gradient_accumulation_steps": 3, "num_train_epochs": 2}),
    "1 row": (1, False, {"num_train_epochs": 2}),
    "drop last": (7, False, {"dataloader_drop_last": True, "gradient_accumulation_steps": 2}),
    "no length": (5, True, {"max_steps": 7}),
    "no length, accumulation": (5, True, {"max_steps": 4, "gradient_accumulation_steps": 2}),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_replicas_with_different_numbers_of_batches(pool: Pools, name: str, tmp_path: Path) -> None:
    """They do what one process does with the rows of both, in as many steps."""
    rows, stream, changes = UNEVEN[name]
    expected = pool(1).run(trained, str(tmp_path), 1, 1, rows, stream, changes | {"per_device_train_batch_size": 2})[0]
    assert expected["steps"] >= 1
    for found in pool(2).run(trained, str(tmp_path), 2, 1, rows, stream, changes):
        same_history(found, expected)
