"""Options of a training, on the ranks of a sequence and in one process."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate (pip install 'ringattn[hf]')")

from tests.hf.trainer_runs import Rows, history, mesh, same_history, trainer_of
from tests.pool import Pools

STEPS = {"max_steps": 4}
CHECKPOINTS = {"gradient_checkpointing", "activation_checkpointing", "reentrant"}
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "activation_checkpointing": {"activation_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "average_tokens_across_devices": {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2},
    "max_grad_norm": {"max_grad_norm": 0.1},
    "eval_on_start": {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2},
    "label_names": {"label_names": ["labels"]},
    "logging_steps": {"logging_steps": 2},
}


def trained(folder: str, data: int, ring: int, changes: dict[str, Any]) -> dict[str, Any]:
    options = STEPS | changes | ({"per_device_train_batch_size": 2 // data})
    trainer = trainer_of(mesh(data, ring), folder, options, train_dataset=Rows(6), eval_dataset=Rows(3, seed=1))
    trainer.train()
    return history(trainer)


@pytest.mark.parametrize("data", [1, 2])
def test_options_of_training(pool: Pools, data: int, tmp_path: Path) -> None:
    """In one process, in two ranks of a sequence, in two replicas; and what changes no number changes none."""
    one = pool(1).run_many(trained, [(str(tmp_path), 1, 1, changes) for changes in OPTIONS.values()])
    two = pool(2).run_many(trained, [(str(tmp_path), data, 2 // data, changes) for changes in OPTIONS.values()])
    expected = {name: ranks[0] for name, ranks in zip(OPTIONS, one, strict=True)}
    for name, ranks in zip(OPTIONS, two, strict=True):
        for found in ranks:
            same_history(found, expected[name])
    for name in (*CHECKPOINTS, "label_names"):
        same_history(expected[name], expected["none"])
    assert len(expected["eval_on_start"]["eval"]) == 3


def test_bf16(pool: Pools, tmp_path: Path) -> None:
    exact = pool(1).run(trained, str(tmp_path), 1, 1, {})[0]
    for found in pool(2).run(trained, str(tmp_path), 1, 2, {"bf16": True}):
        for (_, loss), (_, expected) in zip(found["loss"], exact["loss"], strict=True):
            assert loss == pytest.approx(expected, rel=1e-2)
            assert loss != expected


def evaluated(folder: str, ring: int, changes: dict[str, Any]) -> float:
    return trainer_of(mesh(1, ring), folder, changes, eval_dataset=Rows(4)).evaluate()["eval_loss"]


@pytest.mark.parametrize("option", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluation_in_half_precision(pool: Pools, option: str, tmp_path: Path) -> None:
    exact = pool(1).run(evaluated, str(tmp_path), 1, {})[0]
    for found in pool(2).run(evaluated, str(tmp_path), 2, {option: True}):
        assert found == pytest.approx(exact, rel=1e-2)
        assert found != exact


def with_callbacks(folder: str, ring: int) -> tuple[list[tuple[int, float]], int, int]:
    """Steps and epochs that a callback sees, evaluation batches, and where it stops by itself."""
    from transformers import EarlyStoppingCallback, TrainerCallback

    class Seeing(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[tuple[int, float]] = []
            self.batches = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
            self.seen.append((state.global_step, state.epoch))

        def on_prediction_step(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
            self.batches += 1

    seeing = Seeing()
    changes = {
        "num_train_epochs": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
    }
    trainer = trainer_of(
        mesh(1, ring), folder, changes, train_dataset=Rows(5), eval_dataset=Rows(3),
        callbacks=[seeing, EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    trainer.train()
    return seeing.seen, seeing.batches, trainer.state.global_step


def test_callbacks(pool: Pools, tmp_path: Path) -> None:
    seen, batches, steps = pool(1).run(with_callbacks, str(tmp_path / "1"), 1)[0]
    assert [step for step, _ in seen] == list(range(1, steps + 1))
    assert (steps, batches) == (6, 9)
    for found in pool(2).run(with_callbacks, str(tmp_path / "2"), 2):
        assert found == (seen, batches, steps)


def test_torch_compile(pool: Pools, tmp_path: Path) -> None:
    """Later steps run what the first one compiled."""
    changes = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 3}
    expected = pool(1).run(trained, str(tmp_path), 1, 1, {"max_steps": 3})[0]
    for found in pool(2).run(trained, str(tmp_path), 1, 2, changes, timeout=300.0):
        same_history(found | {"weights": {}}, expected | {"weights": {}})
