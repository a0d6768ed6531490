"""The recipe's `memory` group: which keys there are, what they may hold, and what an engine cannot do."""

from dataclasses import fields

import pytest
from omegaconf import OmegaConf

pytest.importorskip("transformers")

from ringattn.memory.settings import MemorySettings, StateSettings
from ringattn.training.config import memory_keys as memory
from ringattn.training.config.curve import curve_differences
from ringattn.training.config.memory_keys import state_settings, step_settings
from tests.training.recipe import CONFIGS, prepared


def test_each_field_is_a_key():
    keys = set(OmegaConf.load(CONFIGS / "memory" / "off.yaml"))
    known = {one.name for kind in (MemorySettings, StateSettings) for one in fields(kind)}
    assert keys == known - {"host_bytes"} | {"gpu_memory", "host_memory", "margin"}


def test_off_is_what_the_records_are_by_themselves(tmp_path):
    cfg = prepared(f"run.output={tmp_path}", "memory=off").cfg
    assert step_settings(cfg) == MemorySettings()
    assert state_settings(cfg) == StateSettings()


def test_keys_reach_the_records(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "why_no_optimizer", lambda states: None)
    given = ["loss_tile=512", "mlp_tile=1024", "keep=attention", "every=2", "host_layers=1", "weights=bfloat16"]
    given += ["moments=int8", "reduce=bfloat16", "states_on=host", "reshard=false", "prefetch=0"]
    cfg = prepared(f"run.output={tmp_path}", *(f"memory.{one}" for one in given)).cfg
    found = step_settings(cfg)
    assert (found.loss_tile, found.mlp_tile, found.keep, found.every, found.host_layers) == (
        512,
        1024,
        "attention",
        2,
        1,
    )
    assert state_settings(cfg) == StateSettings("bfloat16", "int8", "bfloat16", "host", False, 0)


def test_what_others_choose_may_be_left_to_them(tmp_path):
    names = [one for one in (*memory.OF_STEP, *memory.OF_STATES) if one not in memory.OF_CURVE]
    cfg = prepared(f"run.output={tmp_path}", *(f"memory.{name}=auto" for name in names)).cfg
    assert state_settings(cfg) == StateSettings()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["memory.loss_tile=0"], ["memory.loss_tile", "at least 1", "0"]),
        (["memory.keep=nothing"], ["memory.keep", "attention", "nothing"]),
        (["memory.keep=all", "memory.host_layers=1"], ["memory.host_layers=1", "attention"]),
        (["memory.weights=auto"], ["memory.weights", "must be chosen"]),
        (["memory.moments=int4"], ["memory.moments", "int8", "int4"]),
        (["memory.states_on=disk"], ["memory.states_on", "host", "disk"]),
        (["memory.reshard=yes"], ["memory.reshard", "yes"]),
        (["memory.prefetch=-1"], ["memory.prefetch", "at least 0", "-1"]),
        (["memory.margin=1.0"], ["memory.margin", "[0, 1)", "1.0"]),
        (["memory.gpu_memory=0"], ["memory.gpu_memory", "GiB", "0"]),
        (["memory.tiles=3"], ["memory.tiles"]),
        (["memory.moments=bfloat16"], ["memory.moments=bfloat16", "weights=bfloat16 moments=bfloat16", "int8"]),
        (["engine=deepspeed", "memory.weights=bfloat16"], ["memory.weights", "fsdp2"]),
        (["engine=deepspeed", "memory.moments=int8"], ["memory.moments", "fsdp2"]),
        (["engine=deepspeed", "memory.prefetch=2"], ["memory.prefetch=2", "zero_stage=2", "zero_stage=3"]),
        (["engine=deepspeed", "memory.states_on=host"], ["memory.states_on=host", "no compiler", "fsdp2"]),
    ],
)
def test_refusals_name_the_key(overrides, words, tmp_path, monkeypatch):
    monkeypatch.setattr("ringattn.training.config.checks.deepspeed_available", lambda: True)
    monkeypatch.setattr(memory, "why_no_cpu_adam", lambda device_type: "no compiler")
    overrides = [one if "tiles" not in one else f"+{one}" for one in overrides]
    with pytest.raises(ValueError, match="memory") as error:
        prepared(f"run.output={tmp_path}", *overrides)
    assert all(word in str(error.value) for word in words), error.value


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"memory\.moments=int8.*pip install 'ringattn\[memory\]'"):
        prepared(f"run.output={tmp_path}", "memory.moments=int8", "run.tensorboard=false")


def test_what_changes_the_curve():
    old = {
        "memory": {"weights": "float32", "moments": "float32", "reduce": "float32", "loss_tile": None, "prefetch": 1}
    }
    new = {"memory": {"weights": "float32", "moments": "int8", "reduce": "float32", "loss_tile": 512, "prefetch": 0}}
    assert curve_differences(old, new) == [("memory.moments", "float32", "int8")]
    assert curve_differences({}, old) == []  # a run from before there were these keys
    assert curve_differences({}, new) == [("memory.moments", "float32", "int8")]
