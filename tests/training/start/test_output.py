"""What a run's folder keeps of a model's configuration, and what is made of it again."""

import json
import math
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ringattn.training.start.output import config_of, model_values, read_config, write_config


def test_floats_that_json_has_not_come_back(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BambaConfig(time_step_limit=(-math.inf, math.inf), num_hidden_layers=2)
    write_config(OmegaConf.create({}), tmp_path, config)
    json.loads((tmp_path / "model.json").read_text(), parse_constant=pytest.fail)  # it is JSON for everybody
    _, values = read_config(tmp_path)
    assert values is not None
    again = config_of(values)
    assert type(again) is type(config)
    assert list(again.time_step_limit) == [-math.inf, math.inf]
    assert model_values(again) == model_values(config) == values
