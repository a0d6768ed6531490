"""Models and runs in numbers."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn import Documents, MeshShape
from ringattn.hf.shape import model_shape
from ringattn.hf.tiny import read_config, tiny_config
from ringattn.mask import Mask
from ringattn.memory.planning.shapes import ModelShape, RunShape
from ringattn.parallel.placement.placement import Placement
from ringattn.training.model.models import empty_model
from tests.memory.planning.shapes_of import llama_8b


def shape_of(source: str, **changes: Any) -> tuple[ModelShape, Any]:
    config = tiny_config(read_config(source), **changes)
    model = empty_model(config)
    return model_shape(model, config), model


@pytest.mark.parametrize("source", ["llama", "qwen3", "gemma2", "mistral", "gpt_oss", "qwen3_moe", "mixtral", "gpt2"])
def test_every_parameter_is_counted_once(source: str) -> None:
    shape, model = shape_of(source)
    assert shape.total.count == sum(p.numel() for p in model.parameters())
    assert shape.total.trained == shape.total.count
    assert sum(count for _, count in shape.masks) == len(shape.layers)
    assert 0 < shape.active <= shape.largest_layer.count
    assert 0 < max(mlp.weights.count for mlp in shape.mlps) < shape.largest_layer.count


def test_what_families_have() -> None:
    gemma, _ = shape_of("gemma2")
    assert gemma.tied
    assert gemma.logit_steps == 3
    assert {mask for mask, _ in gemma.masks} == {Mask(), Mask(window=(4, 0))}
    qwen, _ = shape_of("qwen3")
    assert qwen.head_norms
    assert not qwen.tied
    moe, _ = shape_of("qwen3_moe")
    assert moe.mlps[0].inner == 2 * 32  # two experts of a token
    assert moe.active < moe.largest_layer.count * 0.9
    assert not shape_of("gpt2")[0].mlps[0].gated


def test_inner_rows_are_those_of_the_weights() -> None:
    """OPT's configuration calls them ffn_dim; Granite's shared expert stands beside the others, and is larger here."""
    assert shape_of("opt")[0].mlps[0].inner == 96
    assert shape_of("lfm2")[0].mlps[0].inner == shape_of("lfm2")[1].model.layers[0].feed_forward.w1.out_features
    assert shape_of("granitemoehybrid", num_local_experts=2)[0].mlps[0].inner == 2 * 96 + 1024
    assert shape_of("granitemoehybrid", num_local_experts=0)[0].mlps[0].inner == 1024


def test_experts_that_every_token_goes_through_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="Llama4TextMoe computes all experts of every token"):
        shape_of("llama4_text")


def test_frozen_parameters_are_not_trained() -> None:
    _, model = shape_of("llama")
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    shape = model_shape(model, model.config)
    assert shape.layers[0].trained == 0 < shape.layers[1].trained == shape.layers[1].count


def test_states_that_are_not_counted_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="KimiLinearDeltaAttention is not planned: what the planner"):
        shape_of("kimi_linear")


def test_fewer_layers_keep_their_masks() -> None:
    assert llama_8b().with_layers(8) == llama_8b(8)
    gemma, _ = shape_of("gemma2")
    assert sum(count for _, count in gemma.with_layers(3).masks) == 3


@given(
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=12),
    ring=st.sampled_from([1, 2, 3, 8]),
    ulysses=st.sampled_from([1, 2, 4]),
    policy=st.sampled_from(["auto", "balanced", "zigzag", "contiguous"]),
)
def test_no_rank_has_more_tokens_than_is_said(lengths: list[int], ring: int, ulysses: int, policy: str) -> None:
    run = RunShape(sum(lengths), ring=ring, ulysses=ulysses, lengths=tuple(lengths), policy=policy)
    placement = Placement(Documents(lengths), MeshShape(1, ring, ulysses), policy)
    most = max(placement.tokens(rank) for rank in range(ring * ulysses))
    assert most <= run.local_tokens <= sum(lengths)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"tokens": 0}, "tokens must be an integer of at least 1"),
        ({"tokens": 8, "compute": "float8"}, "compute must be one of"),
        ({"tokens": 8, "engine": "ddp"}, "engine must be fsdp2 or deepspeed"),
        ({"tokens": 8, "zero_stage": 4}, "zero_stage must be 1, 2 or 3"),
        ({"tokens": 8, "lengths": (9,)}, "9 tokens"),
    ],
)
def test_wrong_runs_are_named(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        RunShape(**values)
