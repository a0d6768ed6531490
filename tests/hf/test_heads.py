"""Heads of attention as configurations say them, and as weights have them."""

from typing import Any

import pytest

pytest.importorskip("transformers")

from torch import nn

from ringattn.hf.heads import Heads, heads_by_layer, heads_of, latents_of
from ringattn.hf.shape import model_shape
from ringattn.hf.tiny import read_config, tiny_config
from ringattn.training.model.flops import StepFlops
from ringattn.training.model.models import empty_model
from tests.hf.families import FAMILIES

REFUSED = ("kimi_linear", "mamba2", "gemma4_text", "llama4_text")


def tiny(family: str, **changes: Any) -> Any:
    return tiny_config(read_config(family), **changes)


@pytest.mark.parametrize(
    ("family", "heads"),
    [
        ("llama", Heads(4, 4, 16, 16)),
        ("gpt2", Heads(4, 4, 16, 16)),
        ("qwen3", Heads(4, 4, 16, 16)),
        ("deepseek_v2", Heads(4, 4, 24, 12)),
        ("deepseek_v3", Heads(4, 4, 24, 12)),
        ("kimi_linear", Heads(4, 4, 24, 12)),
        ("mimo_v2_flash", Heads(4, 2, 16, 12)),
    ],
)
def test_dims_of_heads(family: str, heads: Heads) -> None:
    assert heads_of(tiny(family)) == heads


@pytest.mark.parametrize("family", [one for one in FAMILIES if one not in REFUSED])
def test_what_is_planned_is_what_attention_multiplies(family: str) -> None:
    """The product after attention is as wide as its output, and those before it are as wide as what goes into it."""
    config = tiny(family, **FAMILIES[family])
    shape = model_shape(model := empty_model(config), config)
    widths = {"q_proj": {shape.query_width, 2 * shape.query_width}, "q_b_proj": {shape.query_width}}
    parts = [part for part in model.modules() if type(part).__name__.endswith("Attention")]
    assert parts
    for part in parts:
        for name, child in part.named_children():
            if isinstance(child, nn.Linear) and name in widths:
                assert child.out_features in widths[name]
            if isinstance(child, nn.Linear) and name in ("o_proj", "out_proj", "dense"):
                assert child.in_features == shape.out_width


def test_layers_with_other_heads_are_refused_by_name() -> None:
    gemma = tiny("gemma4_text")
    assert {heads.dim for heads in heads_by_layer(gemma)} == {16, 32}
    with pytest.raises(NotImplementedError, match="gemma4_text has heads of dims 16, 32, layer by layer"):
        heads_of(gemma)
    wrong = tiny("llama", head_dim=16)
    model = empty_model(wrong)
    model.model.layers[1].self_attn.q_proj = nn.Linear(64, 48, device="meta")
    with pytest.raises(NotImplementedError, match="LlamaAttention has queries of 48 elements, where 4 heads"):
        model_shape(model, wrong)


def test_the_most_key_heads_of_any_layer_are_planned() -> None:
    """MiMo's layers with a window have four, the others two, into which all part."""
    config = tiny("mimo_v2_flash")
    shape = model_shape(empty_model(config), config)
    assert (shape.key_heads, shape.head_chunks(1)) == (4, (1, 2))


def test_latents_with_other_parts_are_refused() -> None:
    config = tiny("deepseek_v3")
    attention = empty_model(config).model.layers[0].self_attn
    attention.indexer = nn.Linear(64, 64, device="meta")
    with pytest.raises(NotImplementedError, match="DeepseekV3Attention has latent keys with indexer"):
        latents_of(attention)


def test_operations_of_attention_are_those_of_each_layers_heads() -> None:
    flops = {}
    for family in ("deepseek_v3", "gemma4_text"):
        config = tiny(family)
        flops[family] = [own for _, own in StepFlops.of(empty_model(config), config).pairs]
    assert flops["deepseek_v3"] == [2 * 4 * (24 + 12)] * 4
    assert flops["gemma4_text"] == [4 * 4 * 16] * 5 + [4 * 4 * 32]
