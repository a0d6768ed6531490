"""`recipe=...`: what it sets, what a user may still set, and that each runs as it stands."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ringattn.training.config.checks import validate
from tests.training.export.small_runs import save_tokenizer
from tests.training.recipe import CONFIGS, prepared, save_model, started

RECIPES = sorted(path.stem for path in (CONFIGS / "recipe").glob("*.yaml"))


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONFIGS), version_base=None):
        values: Any = OmegaConf.to_container(compose("train", list(overrides)))
    return values


@pytest.fixture
def files(tmp_path: Path) -> dict[str, list[str]]:
    """Data for each recipe."""
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / "texts" / f"{number}.txt").write_text("a few words " * 40)
    chat = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "nobody " * 9}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 30)
    cache = f"data.cache={tmp_path / 'cache'}"
    chats = [f"data.sources=[{{path: {tmp_path / 'chats.jsonl'}, kind: chat}}]", cache, "data.processes=1"]
    texts = [f"data.files=[{tmp_path / 'texts'}]", cache]
    return {"tiny": [], "sft": chats} | dict.fromkeys(("extend", "extend_64k", "extend_1m"), texts)


def test_tiny_is_the_default():
    assert composed() == composed("recipe=tiny")
    assert RECIPES == ["extend", "extend_1m", "extend_64k", "sft", "tiny"]


def test_extend_is_as_prolong_published_it():
    first, second, third = (composed(f"recipe={name}") for name in ("extend_64k", "extend", "extend_1m"))
    assert first["model"]["rope"] == {"type": "theta", "theta": 8e6}
    assert second["model"]["rope"] == {"type": "theta", "theta": 1.28e8}
    assert third["model"]["rope"] == {"type": "theta", "theta": 3.2e8}
    for cfg, length, tokens in ((first, 64, 4), (second, 512, 8), (third, 1024, 8)):
        assert cfg["data"]["name"] == "text"
        assert cfg["data"]["seq_len"] == length * 1024
        assert cfg["data"]["seq_len"] * cfg["data"]["packs_per_step"] == tokens * 2**20
        assert (cfg["optim"]["weight_decay"], cfg["optim"]["betas"]) == (0.1, [0.9, 0.95])
        assert (cfg["optim"]["warmup_ratio"], cfg["optim"]["schedule"]) == (0.1, "cosine")
    for cfg in (first, second):
        assert cfg["run"]["steps"] * cfg["data"]["seq_len"] * cfg["data"]["packs_per_step"] == pytest.approx(
            2e10, rel=0.06
        )


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_valid_on_eight_gpus(name, files):
    with initialize_config_dir(str(CONFIGS), version_base=None):
        tokens = ["data.tokenizer=bytes"] if name != "tiny" and name != "sft" else []
        cfg = compose("train", [f"recipe={name}", "model=llama_8b", *files[name], *tokens])
    assert validate(cfg, 8, 8, "cuda").ring == 8


def test_what_a_user_sets_counts(files, tmp_path):
    typed = ["recipe=extend", "data.seq_len=8192", "model.rope.theta=5.0e+5", "optim.lr=1e-3", "optim=muon"]
    cfg = composed(*typed)
    assert (cfg["data"]["seq_len"], cfg["model"]["rope"]["theta"], cfg["optim"]["lr"]) == (8192, 5e5, 1e-3)
    assert cfg["optim"]["name"] == "muon"
    assert composed("recipe=extend", "data=stdlib")["data"]["name"] == "stdlib"
    assert composed("recipe=extend", "model.rope=null")["model"]["rope"] is None
    assert composed("recipe=sft")["model"]["rope"] is None


@pytest.mark.parametrize(
    "name", ["extend", *(pytest.param(one, marks=pytest.mark.slow) for one in ("extend_64k", "extend_1m", "sft"))]
)
def test_with_a_saved_model(name, files, tmp_path):
    """Only what the recipe says of the model changes the saved one, whatever option of `model` is the default."""
    save_model(tmp_path / "saved", max_position_embeddings=1 << 17)
    save_tokenizer(tmp_path / "saved")
    given = [f"recipe={name}", f"model.path={tmp_path / 'saved'}", *files[name], f"run.output={tmp_path / 'out'}"]
    job = prepared(*given, "data.packs_per_step=1", "memory=off", "data.seq_len=4096")
    assert job.cfg.model.config == {}
    assert job.model_config.vocab_size == 300
    said = yaml.safe_load((CONFIGS / "recipe" / f"{name}.yaml").read_text())
    if name == "sft":
        assert job.model_config.rope_parameters["rope_type"] == "llama3"
        assert job.cfg.data.pad
    else:
        theta = said["model"]["rope"]["theta"]
        assert job.model_config.rope_parameters == {"rope_type": "default", "rope_theta": theta}
    assert job.cfg.optim.lr == {"extend_64k": 1e-5, "sft": 2e-5}.get(name, 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["extend", "sft"])
def test_it_trains_scaled_down_and_goes_on(name, files, tmp_path):
    save_model(tmp_path / "saved", max_position_embeddings=1 << 12)
    save_tokenizer(tmp_path / "saved")
    given = [f"recipe={name}", f"model.path={tmp_path / 'saved'}", *files[name], f"run.output={tmp_path / 'out'}"]
    given += ["data.seq_len=512", "data.packs_per_step=1", "run.steps=2"]
    for expected in ("done", "already holds all 2 steps"):
        code, out, err = started(tmp_path, *given)
        assert code == 0, out + err
        assert expected in out
