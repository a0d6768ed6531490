"""Validation and evaluation of runs of other kinds: DeepSpeed's engines, frozen models with factors."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from ringattn.training.engines.deepspeed import available as deepspeed_available
from tests.training.evaluation.test_evaluate import evaluated, prepared, write_texts
from tests.training.recipe import save_model, started

TINY = (
    "model.config.hidden_size=32",
    "model.config.intermediate_size=48",
    "model.config.num_attention_heads=4",
    "model.config.num_key_value_heads=2",
    "data.seq_len=96",
    "run.steps=2",
    "run.evaluate_every=1",
)


def validation(run: Path) -> list[float]:
    return [json.loads(line)["validation"]["validation"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(not deepspeed_available(), reason="deepspeed is not installed")
def test_deepspeed_validates_alike_and_is_refused_by_evaluation(tmp_path: Path) -> None:
    texts = write_texts(tmp_path)
    for name, more in (
        ("fsdp2", ()),
        ("deepspeed", ("engine=deepspeed", "engine.zero_stage=3", "memory.loss_tile=32")),
    ):
        code, out, err = started(
            tmp_path, *TINY, f"run.output={tmp_path}/{name}", f"data.validation={{validation: {texts}}}", *more
        )
        assert code == 0, out + err
    assert validation(tmp_path / "deepspeed") == pytest.approx(validation(tmp_path / "fsdp2"), rel=1e-5)
    with pytest.raises(ValueError, match="trained with engine=deepspeed"):
        prepared(f"model.run={tmp_path}/deepspeed")


@pytest.mark.slow
def test_a_frozen_model_with_factors(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    texts = write_texts(tmp_path)
    save_model(tmp_path / "model", vocab_size=256)
    run = tmp_path / "run"
    lora = (f"model.path={tmp_path}/model", "model.lora={rank: 4}", "optim.lr=0.05", "data.seq_len=512", "run.steps=2")
    code, out, err = started(
        tmp_path, *lora, f"run.output={run}", f"data.validation={{validation: {texts}}}", "run.evaluate_every=1"
    )
    assert code == 0, out + err
    found = validation(run)
    assert abs(found[1] - found[0]) > 1e-3
    position = ("tasks=[position]", f"texts.files=[{texts}]", "max_length=512", "pack=512")
    evaluated(tmp_path, 1, f"model.run={run}", *position, f"texts.cache={tmp_path}/cache")
    result = json.loads((run / "evaluation" / "position.json").read_text())
    # Packs differ in which document is split, so that a few tokens see less.
    assert result["mean"]["full"] == pytest.approx(found[1], rel=2e-3)
    assert abs(result["mean"]["full"] - found[0]) > 1e-3
