"""`model.rope`: the rotary positions that transformers computes from it, and what cannot be."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

pytest.importorskip("transformers")

from ringattn.training.model.architecture import configured, longer_without_rope
from ringattn.training.model.models import build_model
from ringattn.training.model.rope import Rope, rope_of, rope_overrides
from tests.training.recipe import prepared, save_model

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A model with 512 positions and no scaling."""
    folder = tmp_path_factory.mktemp("models") / "plain"
    save_model(folder, rope_parameters=PLAIN)
    return folder


@pytest.fixture(scope="module")
def scaled(tmp_path_factory) -> Path:
    """A model as Llama 3.1: 512 positions, scaled from 128."""
    folder = tmp_path_factory.mktemp("models") / "scaled"
    save_model(folder)
    return folder


def longer(path: Path, rope: Rope, tokens: int) -> Any:
    return configured(None, str(path), {}, rope, tokens)[0]


def frequencies(config: Any) -> torch.Tensor:
    return build_model(config, 0).model.rotary_emb.inv_freq


def test_theta_is_another_base_and_the_length_of_a_pack(plain):
    job = prepared(f"model.path={plain}", "model.rope={type: theta, theta: 8.0e+6}", "data.seq_len=4096")
    assert job.model_config.rope_parameters == {"rope_type": "default", "rope_theta": 8e6}
    assert job.model_config.max_position_embeddings == 4096
    assert "model.config.rope_parameters.rope_theta 10000.0 → 8000000.0" in job.notes[0]
    assert not any("warning: the model was made for" in note for note in job.notes)
    assert job.cfg.model.rope == {"type": "theta", "factor": None, "theta": 8e6, "original": None}
    assert rope_of(job.cfg.model) == Rope("theta", theta=8e6)
    torch.testing.assert_close(frequencies(job.model_config), 8e6 ** (-torch.arange(0, 8, 2) / 8))


def test_theta_leaves_no_saved_scaling_and_no_fewer_positions(scaled):
    config = longer(scaled, Rope("theta", theta=500), 64)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500.0}
    assert config.max_position_embeddings == 512


def test_linear_divides_positions(plain):
    config = longer(plain, Rope("linear", 8), 4096)
    assert config.max_position_embeddings == 4096
    torch.testing.assert_close(frequencies(config) * 8, frequencies(configured(None, str(plain), {})[0]))


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_the_factor_is_what_a_pack_needs(kind, plain, scaled):
    for path, original in ((plain, 512), (scaled, 128)):
        config = longer(path, Rope(kind), 4096)
        rope = config.rope_parameters
        assert (rope["rope_type"], rope["factor"]) == (kind, 4096 / original)
        assert rope["original_max_position_embeddings"] == original
        assert rope["rope_theta"] == 10000.0
        assert config.max_position_embeddings == 4096
        found, plainly = frequencies(config), 10000.0 ** (-torch.arange(0, 8, 2) / 8)
        assert found[0] == plainly[0], "high frequencies stay"
        assert found[-1] < plainly[-1] / 2, "low ones do not"


def test_a_new_model_has_it_too():
    config, _ = configured("llama", None, {"max_position_embeddings": 2048}, Rope("yarn", 4, original=1024), 64)
    rope = config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 1024)
    assert config.max_position_embeddings == 4096
    assert configured("llama", None, {}, Rope("theta", theta=77.0), 64)[0].max_position_embeddings == 2048


def test_too_small_a_factor_is_refused_by_the_longest_document(plain):
    with pytest.raises(ValueError, match=r"data\.seq_len=4096 .* model\.config\.max_position_embeddings=1024"):
        prepared(f"model.path={plain}", "model.rope={type: yarn, factor: 2}", "data.seq_len=4096")
    typed = {"max_position_embeddings": 8192}
    assert configured(None, str(plain), typed, Rope("yarn", 2), 4096)[0].max_position_embeddings == 8192


def test_more_positions_alone_are_warned_of(plain):
    job = prepared(f"model.path={plain}", "model.config.max_position_embeddings=4096", "data.seq_len=4096")
    warning = next(note for note in job.notes if note.startswith("warning: the model was made for"))
    assert all(word in warning for word in ("512", "4,096", "model.rope"))
    _, changes = configured(None, str(plain), {"rope_parameters": {"rope_theta": 8e6}, "max_position_embeddings": 4096})
    assert len(changes) == 2
    assert longer_without_rope(changes) == ""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("yarn", ["model.rope must be", "yarn"]),
        ("{factor: 2}", ["model.rope must be", "factor"]),
        ("{type: yarn, beta: 2}", ["model.rope must be", "beta"]),
        ("{type: longrope}", ["model.rope.type", "linear, yarn, llama3, theta", "longrope"]),
        ("{type: yarn, factor: 0.5}", ["model.rope.factor", "at least 1", "0.5"]),
        ("{type: yarn, factor: .nan}", ["model.rope.factor", "finite"]),
        ("{type: yarn, factor: true}", ["model.rope.factor", "True"]),
        ("{type: theta}", ["model.rope.type=theta", "model.rope.theta"]),
        ("{type: theta, theta: -3}", ["model.rope.theta", "-3"]),
        ("{type: theta, theta: 8.0e+6, factor: 4}", ["model.rope.factor", "theta"]),
        ("{type: yarn, original: 0}", ["model.rope.original", "0"]),
        ("{type: yarn, original: 2.5}", ["model.rope.original", "2.5"]),
    ],
)
def test_refusals_name_the_key(given, words):
    with pytest.raises(ValueError, match=r"model\.rope") as error:
        rope_of(OmegaConf.create({"rope": yaml.safe_load(given)}))
    assert all(word in str(error.value) for word in words), error.value


def test_it_is_not_said_twice(plain):
    with pytest.raises(ValueError, match=r"model\.config\.rope_parameters and model\.rope both"):
        configured(None, str(plain), {"rope_parameters": {"factor": 4.0}}, Rope("yarn"), 64)


def test_families_without_such_positions_say_so():
    from transformers import Gemma3TextConfig, GPT2Config

    def refused(config: Any) -> str:
        with pytest.raises(ValueError, match=r"model\.rope") as error:
            rope_overrides(config, Rope("yarn", 4.0), 4096)
        return str(error.value)

    assert "GPT2Config has no rotary positions" in refused(GPT2Config())
    assert "full_attention, sliding_attention" in refused(Gemma3TextConfig())


def test_positions_are_whole_numbers(plain):
    config = configured(None, str(plain), {})[0]
    assert rope_overrides(config, Rope("linear", 1.7), 64)["max_position_embeddings"] == math.floor(1.7 * 512)
