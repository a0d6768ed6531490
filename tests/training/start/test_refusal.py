"""How recipes refuse: one message, which says what may have been meant."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException

from ringattn.training.start.refusal import message_of, of_a_list

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("run.stepz=3", "did you mean run.steps? "),
        ("data.seqlen=3", "did you mean data.seq_len? "),
        ("parallel.ring_size=2", "did you mean parallel.ring? "),
        ("train.steps=3", "did you mean run.steps? "),
        ("zzz=3", ""),
    ],
)
def test_an_unknown_key_is_named_with_what_may_be_meant(override, meant):
    with (
        initialize_config_dir(str(CONFIGS), version_base=None),
        pytest.raises(ConfigCompositionException) as caught,
    ):
        compose("train", overrides=[override])
    message = message_of(caught.value)
    assert f"Could not override '{override.partition('=')[0]}'" in message
    assert (meant in message) if meant else ("did you mean" not in message)
    assert message.endswith("keys are in configs/, each with a comment")


@pytest.mark.parametrize(
    ("overrides", "key", "options"),
    [
        (["data=sources", "data.files=[a.txt]"], "data.files", "data=text"),
        (["data=text", "data.sources=[]"], "data.sources", "data=sources"),
        (["data.chat_template=x"], "data.chat_template", "data=sources"),  # null there
        (["engine.zero_stage=2"], "engine.zero_stage", "engine=deepspeed"),
    ],
)
def test_a_key_of_another_option_is_named_with_it(overrides, key, options):
    with (
        initialize_config_dir(str(CONFIGS), version_base=None),
        pytest.raises(ConfigCompositionException) as caught,
    ):
        compose("train", overrides=overrides)
    group = key.partition(".")[0]
    assert message_of(caught.value).splitlines()[1:] == [
        f"{key} is a key of {options}; here another {group}= is chosen"
    ]


@pytest.mark.parametrize("override", ["optim.betas.x=1", "run.trackers.first=wandb"])
def test_a_key_in_a_list_is_named(override):
    with initialize_config_dir(str(CONFIGS), version_base=None), pytest.raises(ValueError, match="invalid") as caught:
        compose("train", overrides=[override])
    told = of_a_list(caught.value)
    named = override.partition("=")[0].rpartition(".")[0]
    assert told is not None
    assert f"{named} is a list" in str(told)


def test_another_error_of_a_value_is_left_alone():
    with pytest.raises(ValueError, match="invalid literal") as caught:
        int("x")
    assert of_a_list(caught.value) is None


def test_a_recipe_refuses_a_key_in_a_list_without_a_traceback():
    command = [sys.executable, "recipes/train.py", "optim.betas.x=1"]
    done = subprocess.run(command, cwd=CONFIGS.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "error: optim.betas.x: optim.betas is a list" in done.stderr
    assert "Traceback" not in done.stderr
