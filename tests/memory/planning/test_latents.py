"""Attention with latent keys: what the planner says it holds, against the storages that PyTorch makes and drops."""

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("transformers")

from ringattn.hf.shape import model_shape
from ringattn.hf.tiny import read_config, tiny_config, tiny_model
from ringattn.memory.planning.attention import AttentionUse
from ringattn.memory.planning.limits import GIB, Limits
from ringattn.memory.planning.parts import Latents
from ringattn.memory.planning.planner import Planner
from ringattn.memory.planning.shapes import ModelShape, RunShape
from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.training.model.models import empty_model
from tests.memory.planning.measured import compared
from tests.pool import Pools

H200 = SHIPPED["H200"]
DENSE = {"vocab_size": 256, "intermediate_size": 224, "first_k_dense_replace": 4}  # experts are another error
# Heads that are the most of a layer.
HEAVY = {
    "intermediate_size": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "head_dim": 16, "v_head_dim": 32,
    "q_lora_rank": 48, "kv_lora_rank": 40,
}  # fmt: skip
SOME = ["plain", "layer", "selective", "attention", "attention, three away", "layer, MLP"]


def latent(family: str, changes: dict[str, Any]) -> tuple[Any, Any]:
    config = tiny_config(read_config(family), **(DENSE | changes))
    return tiny_model(config).train(), config


def shape_of(family: str, **changes: Any) -> ModelShape:
    config = tiny_config(read_config(family), **changes)
    return model_shape(empty_model(config), config)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_live_storages_are_those_of_the_plan(pool: Pools, family: str) -> None:
    (found,) = pool(1).run(compared, latent, (family, {}), "float32", SOME, [512])
    wrong = [one for one in found if one[2] != pytest.approx(1.0, abs=0.02)]
    assert not wrong, found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_they_are_where_heads_are_the_most_of_a_layer(pool: Pools, dtype: str) -> None:
    """As in models of real sizes: queries alone are three times as wide as what goes into the layer."""
    (found,) = pool(1).run(compared, latent, ("deepseek_v3", HEAVY), dtype, ["plain", "layer", "attention"], [512])
    wrong = [one for one in found if one[2] != pytest.approx(1.0, abs=0.05)]
    assert not wrong, found


def test_what_heads_are_made_of() -> None:
    """The `head_dim` of these configurations is 8, that of the part that is turned."""
    shape = shape_of("deepseek_v3")
    assert (shape.query_width, shape.key_width, shape.value_width, shape.out_width) == (96, 96, 48, 48)
    assert shape.latents == Latents(queries=32, keys=32, rotary=8, turned=True, narrow=32 + 40)
    without = shape_of("deepseek_v2", q_lora_rank=None).latents
    assert without == Latents(queries=0, keys=32, rotary=8, turned=True, narrow=96 + 40)
    assert shape_of("llama").latents is None
    attention = shape.attention(2)
    assert (attention.head_dim, attention.value_dim) == (24, 12)


def test_attention_is_timed_by_the_dims_of_heads() -> None:
    shape, run = shape_of("deepseek_v3"), RunShape(2**16)
    time = Planner(shape, run, Limits(1000 * GIB), H200).settled({"keep": "layer"}).time
    pairs = len(shape.layers) * 2**16 * (2**16 + 1) / 2
    products = 6 * (shape.active * len(shape.layers) + 97 * 64) * 2**16
    assert time.flops == pytest.approx(products + 6 * (96 + 48) * pairs)
    narrow = AttentionUse.of(replace(shape, head_dim=8, values=0), run, H200)
    assert AttentionUse.of(shape, run, H200).forward_seconds > 1.5 * narrow.forward_seconds


def test_selective_keeps_the_narrow_products_of_an_mlp() -> None:
    """Of a shared expert those before its last one; of other MLPs here none is narrow."""
    assert shape_of("deepseek_v3", first_k_dense_replace=0).mlps[0].narrow == 2 * 32
    assert shape_of("llama", intermediate_size=224).mlps[0].narrow == 0
