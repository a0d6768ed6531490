"""What to change next when a step does not fit."""

from dataclasses import replace

import pytest

from ringattn.memory.advice import Load, changes, next_change
from ringattn.memory.settings import MemorySettings, StateSettings

# An 8B model, 64 thousand tokens on each of 8 GPUs.
LOAD = Load(
    tokens=65536, hidden=4096, inner=14336, words=128256, queries=4096, keys=1024, layers=32, parameters=8_030_000_000,
    gpus=8, width=2,
)  # fmt: skip
GIB = 2**30


def names(settings: MemorySettings, states: StateSettings | None = None, load: Load = LOAD) -> list[str]:
    return [one.keys.split("=")[0] for one in changes(settings, states or StateSettings(), load)]


def test_cheapest_first() -> None:
    assert names(MemorySettings()) == [
        "memory.loss_tile", "memory.mlp_tile", "memory.keep", "memory.states_on", "16 GPUs instead of 8"
    ]  # fmt: skip
    tiles = MemorySettings(512, 512, "attention")
    assert names(tiles) == [
        "memory.host_layers", "memory.states_on", "memory.keep", "16 GPUs instead of 8"
    ]  # fmt: skip
    all_away = replace(tiles, keep="layer", host_layers=32, host_bytes=1)
    assert names(all_away, StateSettings(states_on="host")) == []
    assert names(replace(tiles, keep="layer")) == [
        "memory.host_layers", "memory.states_on", "memory.every", "16 GPUs instead of 8"
    ]  # fmt: skip


def test_what_it_saves() -> None:
    found = {one.keys.split("=")[0]: one for one in changes(MemorySettings(), StateSettings(), LOAD)}
    # Three float32 copies of the logits: 1.47 MiB a token.
    assert found["memory.loss_tile"].saves == (65536 - 2048) * 12 * 128256
    assert found["memory.states_on"].saves == 8_030_000_000 * 16 // 8
    assert str(found["memory.loss_tile"]) == "memory.loss_tile=2048 saves about 91.0 GiB a GPU"
    # 8 KB of input, 8 KB of attention's output a token and layer; q, k, v and o are 20 KB.
    assert LOAD.kept("layer") == 65536 * 8192
    assert LOAD.kept("attention") == 65536 * 16384
    assert LOAD.kept("selective") - LOAD.kept("attention") == 65536 * 20 * 1024


def test_the_first_that_saves_enough_else_the_most() -> None:
    settings = MemorySettings(loss_tile=2048)
    assert next_change(settings, StateSettings(), LOAD, GIB).keys == "memory.loss_tile=1024"
    assert next_change(settings, StateSettings(), LOAD, 4 * GIB).keys == "memory.mlp_tile=2048"
    assert next_change(settings, StateSettings(), LOAD, 10**15).keys == "memory.keep=selective"


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_sizes_of_a_model(family: str) -> None:
    pytest.importorskip("transformers")
    from ringattn.hf.tiny import read_config, tiny_config

    config = tiny_config(read_config(family), num_key_value_heads=2)
    load = Load.of(config, 100, 1000, 4)
    assert (load.hidden, load.inner, load.words, load.queries, load.keys) == (64, 96, 97, 64, 32)
    assert load.layers == config.get_text_config().num_hidden_layers
