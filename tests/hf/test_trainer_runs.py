"""Options of a training, on the ranks of a sequence and in one process."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate (pip install 'ringattn[hf]')")

from tests.hf.trainer_runs import Rows, failure, history, mesh, same_history, small_model, trainer_of
from tests.pool import Pools

STEPS = {"max_steps": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "gradient_checkpointing": {"gradient_checkpointing": True, "label_names": ["labels"]},
    "activation_checkpointing": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "many": {
        "average_tokens_across_devices": False,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.1,
        "logging_steps": 2,
        "eval_on_start": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
    },
}
CHANGE_NOTHING = ("gradient_checkpointing", "activation_checkpointing", "reentrant")


def trained(folder: str, data: int, ring: int, changes: dict[str, Any]) -> dict[str, Any]:
    options = STEPS | changes | ({"per_device_train_batch_size": 2 // data})
    trainer = trainer_of(mesh(data, ring), folder, options, train_dataset=Rows(6), eval_dataset=Rows(3, seed=1))
    trainer.train()
    return history(trainer)


@pytest.fixture(scope="module")
def in_one_process(pool: Pools, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The history of each option."""
    folder = str(tmp_path_factory.mktemp("one"))
    found = pool(1).run_many(trained, [(folder, 1, 1, changes) for changes in OPTIONS.values()])
    return {name: ranks[0] for name, ranks in zip(OPTIONS, found, strict=True)}


@pytest.mark.parametrize("data", [1, 2])
def test_options_of_training(pool: Pools, data: int, in_one_process: dict[str, Any], tmp_path: Path) -> None:
    """In one process, in two ranks of a sequence, in two replicas; and what changes no number changes none."""
    two = pool(2).run_many(trained, [(str(tmp_path), data, 2 // data, changes) for changes in OPTIONS.values()])
    expected = in_one_process
    for name, ranks in zip(OPTIONS, two, strict=True):
        for found in ranks:
            same_history(found, expected[name])
    for name in CHANGE_NOTHING:
        same_history(expected[name], expected["none"])
    assert [step for step, _ in expected["many"]["eval"]] == [0, 2, 4]
    assert [step for step, _ in expected["many"]["loss"]] == [2, 4]


def assert_rounded(found: dict[str, Any], alone: dict[str, Any], exact: dict[str, Any], keys: Sequence[str]) -> None:
    """Ranks of a sequence round as one process does, and not as one that does not round."""
    for key in keys:
        values, expected, others = ([value for _, value in run[key]] for run in (found, alone, exact))
        assert values == pytest.approx(expected, rel=3e-4)  # weights drift apart from step to step
        assert all(value != other for value, other in zip(values, others, strict=True))


def test_bf16(pool: Pools, tmp_path: Path) -> None:
    exact, alone = (pool(1).run(trained, str(tmp_path), 1, 1, changes)[0] for changes in ({}, {"bf16": True}))
    for found in pool(2).run(trained, str(tmp_path), 1, 2, {"bf16": True}):
        assert_rounded(found, alone, exact, ["loss"])


def evaluated(folder: str, ring: int, changes: dict[str, Any]) -> float:
    return trainer_of(mesh(1, ring), folder, changes, eval_dataset=Rows(4)).evaluate()["eval_loss"]


@pytest.mark.parametrize("option", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluation_in_half_precision(pool: Pools, option: str, tmp_path: Path) -> None:
    exact, alone = (pool(1).run(evaluated, str(tmp_path), 1, changes)[0] for changes in ({}, {option: True}))
    for found in pool(2).run(evaluated, str(tmp_path), 2, {option: True}):
        assert found == pytest.approx(alone, rel=1e-4)
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


class Averaged(torch.optim.SGD):
    """Evaluates with the weights that it began with, as schedule-free optimizers do with an average of them."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.first = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        self.kept: list[torch.Tensor] | None = None

    def _put(self, weights: list[torch.Tensor]) -> None:
        for p, value in zip((p for group in self.param_groups for p in group["params"]), weights, strict=True):
            p.data.copy_(value)

    def eval(self) -> None:
        if self.kept is None:
            self.kept = [p.detach().clone() for group in self.param_groups for p in group["params"]]
            self._put(self.first)

    def train(self) -> None:
        if self.kept is not None:
            self._put(self.kept)
            self.kept = None


def with_modes(folder: str) -> list[float]:
    model = small_model()
    changes = STEPS | {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_of(
        mesh(1, 2), folder, changes, model=model, train_dataset=Rows(6), eval_dataset=Rows(3, seed=1),
        optimizers=(Averaged(model.parameters()), None),
    )  # fmt: skip
    trainer.train()
    return [loss for _, loss in history(trainer)["eval"]]


def test_optimizers_with_modes(pool: Pools, tmp_path: Path) -> None:
    for first, *later in pool(2).run(with_modes, str(tmp_path)):
        assert later == pytest.approx([first, first], rel=1e-6)


def stopped_by_one(folder: str) -> tuple[int, int]:
    """Rank 1 finds after its second step that its time is up."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
            control.should_training_stop |= dist.get_rank() == 1 and state.global_step == 2

    trainer = trainer_of(mesh(1, 2), folder, STEPS, train_dataset=Rows(6), callbacks=[Clock()])
    trainer.train()
    return trainer.state.global_step, len(trainer.state.log_history)


def test_a_decision_of_one_rank(pool: Pools, tmp_path: Path) -> None:
    assert pool(2).run(stopped_by_one, str(tmp_path)) == [(2, 3), (2, 3)]


@contextlib.contextmanager
def taken_for_a_gpu() -> Iterator[None]:
    """Accelerate shards models on GPUs only; on CPUs, taken for them, what it does works as well."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    place = ("gloo", DistributedType.MULTI_GPU)
    AcceleratorState._reset_state(True)
    try:
        with (
            mock.patch.dict(os.environ, ACCELERATE_TORCH_DEVICE="cpu"),
            mock.patch.object(PartialState, "_prepare_backend", return_value=place),
        ):
            yield
    finally:
        AcceleratorState._reset_state(True)


def sharded(folder: str, changes: dict[str, Any]) -> tuple[dict[str, Any], float, str]:
    options = STEPS | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": False} | changes
    with taken_for_a_gpu():
        trainer = trainer_of(mesh(1, 2), folder, options, train_dataset=Rows(6), eval_dataset=Rows(3, seed=1))
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
        return history(trainer) | {"weights": {}}, loss, type(trainer.model_wrapped).__name__


def unsharded(folder: str) -> tuple[dict[str, Any], float]:
    options = STEPS | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = trainer_of(mesh(1, 1), folder, options, train_dataset=Rows(6), eval_dataset=Rows(3, seed=1))
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    return history(trainer) | {"weights": {}}, loss


def test_fsdp(pool: Pools, tmp_path: Path) -> None:
    expected, loss = pool(1).run(unsharded, str(tmp_path))[0]
    changes = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    for found, found_loss, kind in pool(2).run(sharded, str(tmp_path), changes):
        assert kind == "FSDPLlamaForCausalLM"
        same_history(found, expected)
        assert found_loss == pytest.approx(loss, rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(pool: Pools, stage: int, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (pip install 'ringattn[deepspeed]')")
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
    expected, loss = pool(1).run(unsharded, str(tmp_path))[0]
    changes = {"deepspeed": {"zero_optimization": {"stage": stage}} | dict.fromkeys(sizes, "auto")}
    for found, found_loss, kind in pool(2).run(sharded, str(tmp_path), changes, timeout=300.0):
        assert kind == "DeepSpeedEngine"
        same_history(found, expected)
        assert found_loss == pytest.approx(loss, rel=2e-5)


def scaled(folder: str, ring: int) -> dict[str, Any]:
    """What fp16=True does, which Accelerate does on GPUs only: autocast to float16 and a scaled loss."""
    trainer = trainer_of(mesh(1, ring), folder, STEPS | {"per_device_train_batch_size": 2}, train_dataset=Rows(6))
    trainer.accelerator.state._mixed_precision = "fp16"
    trainer.accelerator.native_amp, trainer.accelerator.scaler = True, torch.amp.GradScaler("cpu")
    try:
        trainer.train()
    finally:
        trainer.accelerator.state._mixed_precision = "no"
    assert trainer.accelerator.scaler.get_scale() == 2.0**16
    return history(trainer)


def test_fp16(pool: Pools, tmp_path: Path) -> None:
    exact = pool(1).run(trained, str(tmp_path), 1, 1, {})[0]
    alone = pool(1).run(scaled, str(tmp_path), 1)[0]
    for found in pool(2).run(scaled, str(tmp_path), 2):
        assert_rounded(found, alone, exact, ["loss", "norm"])


def misplaced(folder: str) -> str:
    """A CPU that Accelerate is not told of: it would take every rank for a job of its own."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    try:
        return failure(lambda: trainer_of(mesh(1, 2), folder, {"use_cpu": False}, train_dataset=Rows(6)))
    finally:
        AcceleratorState._reset_state(True)


def test_ranks_that_accelerate_does_not_see(pool: Pools, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("Accelerate sees GPUs by itself")
    for told in pool(2).run(misplaced, str(tmp_path)):
        assert told == (
            "ValueError: Accelerate must see the 2 processes of the mesh on cpu, it sees 1 processes on cpu; "
            "use_cpu=True tells it"
        )


def unwrapped_training(folder: str) -> str:
    """A wrapper that leaves the gradients of each rank as they are."""
    trainer = trainer_of(mesh(1, 2), folder, STEPS, train_dataset=Rows(6))
    trainer.accelerator.prepare_model = lambda model, **_: model
    return failure(trainer.train)


def test_gradients_that_nobody_averages(pool: Pools, tmp_path: Path) -> None:
    for told in pool(2).run(unwrapped_training, str(tmp_path)):
        assert told.startswith("RuntimeError: gradients differ between ranks, their norms are ")


@pytest.mark.slow
def test_torch_compile(pool: Pools, tmp_path: Path) -> None:
    """Later steps run what the first one compiled."""
    changes = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 3}
    expected = pool(1).run(trained, str(tmp_path), 1, 1, {"max_steps": 3})[0]
    for found in pool(2).run(trained, str(tmp_path), 1, 2, changes, timeout=300.0):
        same_history(found | {"weights": {}}, expected | {"weights": {}})
