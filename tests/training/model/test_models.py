"""Models: the same weights for the same seed, the shapes they are named after."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

pytest.importorskip("transformers")

from pathlib import Path

from ringattn.hf.layers import decoder_layers
from ringattn.training.model.models import (
    build_model,
    empty_model,
    model_config,
    parameter_groups,
)

CONFIGS = Path(__file__).parents[3] / "configs"
SMALL = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def configured(name: str):
    with initialize_config_dir(str(CONFIGS), version_base=None):
        cfg = OmegaConf.to_container(compose("train", [f"model={name}"]).model)
    return model_config(cfg["family"], cfg["path"], cfg["config"])


@pytest.mark.parametrize(("name", "billions"), [("tiny", 0.0021), ("llama_8b", 8.03), ("qwen3_8b", 8.19)])
def test_models_have_the_parameters_that_their_names_say(name, billions):
    config = configured(name)
    model = empty_model(config)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=2e-3)
    assert len(decoder_layers(model)) == config.num_hidden_layers
    assert not config.use_cache
    if name != "tiny":
        assert config.head_dim == 128


def test_the_seed_gives_the_weights_and_leaves_the_random_state_alone():
    config = model_config("llama", None, SMALL)
    before = torch.get_rng_state()
    one, two, other = build_model(config, 0), build_model(config, 0), build_model(config, 1)
    assert torch.equal(torch.get_rng_state(), before)
    for (name, a), b, c in zip(one.named_parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dim() < 2 or not torch.equal(a, c), name


def test_derived_keys_follow_the_overrides():
    config = model_config("llama", None, SMALL)
    assert config.head_dim == 4
    config = model_config("qwen3", None, SMALL | {"num_hidden_layers": 3})
    assert len(config.layer_types) == 3


def test_a_local_checkpoint_with_overrides(tmp_path):
    model = build_model(model_config("llama", None, SMALL), 3)
    model.save_pretrained(tmp_path)
    config = model_config("qwen3", str(tmp_path), {"max_position_embeddings": 77})
    assert config.max_position_embeddings == 77
    assert config.hidden_size == 16
    loaded = build_model(config, 0, str(tmp_path))
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)
        assert b.dtype == torch.float32


def test_norms_have_no_weight_decay():
    decayed, plain = parameter_groups(empty_model(model_config("llama", None, SMALL)), 0.1)
    assert decayed["weight_decay"] == 0.1
    assert all(p.dim() == 2 for p in decayed["params"])
    assert plain["weight_decay"] == 0.0
    assert len(plain["params"]) == 5
