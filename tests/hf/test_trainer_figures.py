"""The Trainer's figures over replicas and ranks: evaluation, and counts of rows, steps, tokens and operations."""

from pathlib import Path

import pytest
import torch

from tests.hf.trainer_runs import Rows, Stream, make_rows, mesh, small_model, trainer_of
from tests.pool import Pools

pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate (pip install 'ringattn[hf]')")


def evaluated(folder: str, data: int, ring: int, stream: bool, rows: int, batch: int) -> tuple[float, int, int]:
    trainer = trainer_of(
        mesh(data, ring), folder, {"per_device_eval_batch_size": batch}, eval_dataset=(Stream if stream else Rows)(rows)
    )
    found = trainer.evaluate()
    samples, steps = (found[f"eval_{name}_per_second"] * found["eval_runtime"] for name in ("samples", "steps"))
    return found["eval_loss"], round(samples), round(steps)


def evaluated_by_name(folder: str) -> dict[str, float]:
    sets = {"short": Rows(1), "long": Rows(4, seed=1)}
    return trainer_of(mesh(2, 1), folder, eval_dataset=sets).evaluate()


def test_evaluation_of_several_sets(pool: Pools, tmp_path: Path) -> None:
    for found in pool(2).run(evaluated_by_name, str(tmp_path)):
        assert found["eval_short_loss"] == pytest.approx(alone(1), rel=2e-6)
        assert found["eval_long_loss"] == pytest.approx(alone(4, seed=1), rel=2e-6)


def alone(rows: int, seed: int = 0) -> float:
    """The mean over all targets of rows, each run alone through transformers' own model."""
    model, total, targets = small_model().double(), 0.0, 0
    for row in make_rows(rows, seed):
        ids = torch.tensor([row["input_ids"]])
        logits = model(input_ids=ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        targets += ids.shape[1] - 1
    return total / targets


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("data", "ring", "rows", "batch"), [(2, 1, 5, 2), (2, 1, 1, 1), (1, 2, 3, 2), (2, 2, 3, 2)])
def test_evaluation_counts_every_row_once(
    pool: Pools, stream: bool, data: int, ring: int, rows: int, batch: int, tmp_path: Path
) -> None:
    """Also where a replica has no row at all."""
    for loss, samples, steps in pool(data * ring).run(evaluated, str(tmp_path), data, ring, stream, rows, batch):
        assert loss == pytest.approx(alone(rows), rel=2e-6)
        assert samples == rows
        assert steps == -(-rows // (batch * data))


def counted(folder: str, data: int, ring: int, kind: str) -> tuple[int, float, int]:
    changes = {"include_num_input_tokens_seen": kind, "per_device_train_batch_size": 4 // data}
    trainer = trainer_of(mesh(data, ring), folder, changes, train_dataset=Rows(6))
    trainer.train()
    return (
        trainer.state.num_input_tokens_seen,
        trainer.state.total_flos,
        trainer.get_total_train_batch_size(trainer.args),
    )


@pytest.mark.parametrize(("data", "ring"), [(1, 1), (1, 2), (2, 1)])
def test_tokens_seen(pool: Pools, data: int, ring: int, tmp_path: Path) -> None:
    """Those of the global batch, once: not once for each of its ranks. So are operations and rows."""
    true = sum(len(row["input_ids"]) for row in make_rows(6))
    for tokens, _, rows in pool(data * ring).run(counted, str(tmp_path), data, ring, "non_padding"):
        assert (tokens, rows) == (true, 4)
    expected = pool(1).run(counted, str(tmp_path), 1, 1, "all")[0]
    assert expected[0] > true
    for tokens, flos, _ in pool(data * ring).run(counted, str(tmp_path), data, ring, "all"):
        if data == 1:  # replicas of two rows are padded to other sizes than one of four
            assert (tokens, flos) == expected[:2]
        assert true <= tokens <= expected[0]
