"""The Trainer's model, whoever sets it: at the start, before every training, at the end, or around another."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate (pip install 'ringattn[hf]')")

from ringattn.hf import parallelize
from tests.hf.trainer_runs import Rows, failure, history, make_rows, mesh, same_history, small_model, trainer_of
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

STEPS = {"max_steps": 3}


def trained(folder: str, ring: int, how: str) -> list[dict[str, Any]]:
    """The histories of one or two trainings."""
    where, rows = mesh(1, ring), Rows(6)
    again = how in ("init", "trial")
    initial: dict[str, Any] = {"model_init": lambda: small_model()} if again else {"model": small_model()}
    trainer = trainer_of(where, folder, STEPS, train_dataset=rows, **initial)
    if how == "set":
        trainer.model = small_model(seed=1)
    histories = []
    for number in range(2 if again else 1):
        with mock.patch("transformers.integrations.hp_params", dict):  # knows trials of installed libraries only
            trainer.train(trial={"learning_rate": 3e-3} if how == "trial" else None)
        assert trainer.model.config._attn_implementation == "ringattn", number
        histories.append(history(trainer))
    return histories


@pytest.mark.parametrize("how", ["init", pytest.param("trial", marks=pytest.mark.slow), "set"])
def test_models_that_are_set_later(pool: Pools, how: str, tmp_path: Path) -> None:
    """model_init makes one before each training (and each trial), the user may put another in."""
    expected = pool(1).run(trained, str(tmp_path), 1, how)[0]
    true = stock(how)
    for found in pool(2).run(trained, str(tmp_path), 2, how):
        assert len(found) == len(expected)
        for mine, theirs in zip(found, expected, strict=True):
            assert mine["loss"][0][1] == pytest.approx(true, rel=1e-5)
            same_history(mine, theirs)


def stock(how: str) -> float:
    """The loss of the first row of the order, by transformers' own model."""
    from accelerate.data_loader import SeedableRandomSampler

    rows = make_rows(6)
    first = next(iter(SeedableRandomSampler(rows, False, None, torch.Generator(), data_seed=1)))
    ids = torch.tensor([rows[first]["input_ids"]])
    return small_model(seed=1 if how == "set" else 0)(input_ids=ids, labels=ids).loss.item()


def determined(folder: str) -> list[bool]:
    """Whether attention is asked for the same gradients from run to run."""
    found = []
    for full in (False, True):
        try:
            trainer = trainer_of(mesh(1, 1), folder, {"full_determinism": full}, train_dataset=Rows(1))
            found.append(trainer.model._ringattn.options.get("deterministic", False))
        finally:
            torch.use_deterministic_algorithms(False)
    return found


def test_full_determinism(pool: Pools, tmp_path: Path) -> None:
    assert pool(1).run(determined, str(tmp_path))[0] == [False, True]


def on_another_mesh(folder: str) -> str:
    model = small_model()
    parallelize(model, mesh_of(2, 1))
    trainer = trainer_of(mesh(2, 1), folder, STEPS, train_dataset=Rows(6))

    def put_in() -> None:
        trainer.model = model

    return failure(put_in)


def test_a_model_of_another_mesh(pool: Pools, tmp_path: Path) -> None:
    for told in pool(2).run(on_another_mesh, str(tmp_path)):
        assert told.startswith("ValueError: model was parallelized on SequenceMesh(data=1, ring=2")


def became_unfit(folder: str) -> str:
    """Whoever changes the configuration after __init__."""
    trainer = trainer_of(mesh(1, 1), folder, STEPS, model=small_model(family="mixtral"), train_dataset=Rows(6))
    trainer.model.config.chunk_size_feed_forward = 8
    return failure(trainer.train)


def test_a_model_that_became_unfit(pool: Pools, tmp_path: Path) -> None:
    told = pool(1).run(became_unfit, str(tmp_path))[0]
    assert told.startswith("NotImplementedError: MixtralForCausalLM has chunk_size_feed_forward=8")


def best(folder: str, ring: int, only_model: bool) -> tuple[dict[str, Any], str, float]:
    """The highest loss is taken for the best: that of the first evaluation."""
    changes = {
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_only_model": only_model,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
    }
    trainer = trainer_of(mesh(1, ring), folder, changes, train_dataset=Rows(6), eval_dataset=Rows(4, seed=1))
    trainer.train()
    assert trainer.model.config._attn_implementation == "ringattn"
    return history(trainer), Path(trainer.state.best_model_checkpoint).name, trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("only_model", [False, True])
def test_the_best_model_is_loaded_at_the_end(pool: Pools, only_model: bool, tmp_path: Path) -> None:
    expected, name, loss = pool(1).run(best, str(tmp_path / "1"), 1, only_model)[0]
    losses = dict(expected["eval"])
    assert (name, losses[2] > losses[4]) == ("checkpoint-2", True)
    for found, same_name, found_loss in pool(2).run(best, str(tmp_path / "2"), 2, only_model):
        assert same_name == name
        assert found_loss == pytest.approx(loss, rel=2e-5)
        assert found_loss == pytest.approx(losses[2], rel=2e-5)
        same_history(found, expected)


def with_adapters(folder: str, ring: int, resume: bool) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(small_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(mesh(1, ring), folder, changes, model=model, train_dataset=Rows(6))
    trainer.train(resume_from_checkpoint=str(Path(folder, "checkpoint-2")) if resume else None)
    found = history(trainer)
    return found | {"weights": {name: x for name, x in found["weights"].items() if "lora" in name}}


def test_adapters(pool: Pools, tmp_path: Path) -> None:
    """PEFT around the model; a run that goes on loads them."""
    pytest.importorskip("peft", reason="PEFT is not installed (pip install 'ringattn[hf]')")
    expected = pool(1).run(with_adapters, str(tmp_path), 1, False)[0]
    assert expected["weights"]
    for resume in (False, True):
        for found in pool(2).run(with_adapters, str(tmp_path), 2, resume):
            same_history(found, expected)
