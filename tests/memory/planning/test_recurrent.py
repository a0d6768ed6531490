"""Layers that carry a state: what the planner says they hold, against the storages that PyTorch makes and drops."""

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("transformers")

from hypothesis import given
from hypothesis import strategies as st

from ringattn import Documents, MeshShape
from ringattn.hf.shape import model_shape, weighed_layers
from ringattn.hf.tiny import read_config, tiny_config, tiny_model
from ringattn.memory.planning import recurrent as planned
from ringattn.memory.planning.attention import AttentionUse
from ringattn.memory.planning.items import RECURRENCE
from ringattn.memory.planning.limits import GIB, Limits
from ringattn.memory.planning.parts import Parts
from ringattn.memory.planning.planner import Planner
from ringattn.memory.planning.recurrent import RecurrentUse
from ringattn.memory.planning.shapes import ModelShape, RunShape, layout_of
from ringattn.memory.planning.ways import FreeShape, Ways
from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.recurrent import recurrence
from ringattn.recurrent.weighing import weighed_layout
from ringattn.training.model.models import empty_model
from tests.memory.planning.measured import compared
from tests.pool import Pools

H200 = SHIPPED["H200"]
WIDE = {"vocab_size": 256, "intermediate_size": 224}
# Families, with layers of every kind that they have and none that another planner's error would drown.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {},
    "olmo_hybrid": {},
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {},
    "nemotron_h": {"layer_types": ["linear_attention", "mlp", "full_attention", "mlp"]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
    "jamba": {
        "num_experts": 1, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
        "mamba_expand": 1, "mamba_d_state": 4,
    },
    "minimax": {"block_size": 4, "num_local_experts": 1, "num_experts_per_tok": 1, "router_jitter_noise": 0.0},
}  # fmt: skip
SOME = ["plain", "layer", "attention"]


def hybrid(family: str, changes: dict[str, Any]) -> tuple[Any, Any]:
    config = tiny_config(read_config(family), **WIDE, **FAMILIES.get(family, {}), **changes)
    return tiny_model(config).train(), config


def shape_of(family: str, **changes: Any) -> tuple[ModelShape, Any]:
    config = tiny_config(read_config(family), **(FAMILIES.get(family, {}) | changes))
    model = empty_model(config)
    return model_shape(model, config), model


@pytest.mark.parametrize("family", FAMILIES)
def test_live_storages_are_those_of_the_plan(pool: Pools, family: str) -> None:
    tokens = 256 if family == "jamba" else 512  # whose chunks are slow
    (found,) = pool(1).run(compared, hybrid, (family, {}), "float32", SOME, [tokens])
    wrong = [one for one in found if one[2] != pytest.approx(1.0, abs=0.07)]
    assert not wrong, found


@pytest.mark.parametrize("family", [pytest.param("qwen3_5_text", marks=pytest.mark.slow), "bamba"])
def test_they_are_with_the_dims_of_real_models(pool: Pools, family: str) -> None:
    """Where dims are as wide as chunks, other tensors are the largest."""
    wide = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    wide = wide if family == "qwen3_5_text" else {"mamba_d_state": 128}
    (found,) = pool(1).run(compared, hybrid, (family, wide), "float32", SOME, [512])
    wrong = [one for one in found if one[2] != pytest.approx(1.0, abs=0.07)]
    assert not wrong, found
    (found,) = pool(1).run(compared, hybrid, (family, wide), "bfloat16", ["plain", "layer"], [512])
    wrong = [one for one in found if one[2] != pytest.approx(1.0, abs=0.1)]
    assert not wrong, found


def test_mlps_in_tiles_and_layers_on_the_host(pool: Pools) -> None:
    names = ["layer, MLP", "attention, MLP", "layer of every 2", "attention, three away", "layer, all away"]
    (found,) = pool(1).run(compared, hybrid, ("qwen3_5_text", {}), "float32", names, [512])
    wrong = [one for one in found if one[2] != pytest.approx(1.0, abs=0.07)]
    assert not wrong, found


def compared_by(route: str, *rest: Any) -> list[tuple[str, str, float]]:
    """As `compared`, by a route that is named instead of chosen."""
    ours, theirs = recurrence.cheaper, planned.prices
    recurrence.cheaper = lambda priced: route
    planned.prices = lambda *prices: [one for one in theirs(*prices) if one.route == route]
    try:
        return compared(*rest)
    finally:
        recurrence.cheaper, planned.prices = ours, theirs


@pytest.mark.parametrize("route", ["scan", "exchange"])
@pytest.mark.parametrize(
    "family", ["qwen3_5_text", "nemotron_h", "minimax", pytest.param("jamba", marks=pytest.mark.slow)]
)
def test_both_routes_on_two_ranks(pool: Pools, family: str, route: str) -> None:
    """By the scan a rank keeps the inputs of its pieces and the maps of all, and computes them again."""
    for found in pool(2).run(compared_by, route, hybrid, (family, {}), "float32", ["plain", "layer"], [1024], 2):
        wrong = [one for one in found if one[2] != pytest.approx(1.0, abs=0.1)]
        assert not wrong, found


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_next", "granitemoehybrid", "qwen3_5_moe_text"])
def test_every_parameter_is_counted_and_every_layer_has_its_parts(family: str) -> None:
    shape, model = shape_of(family)
    assert shape.total.count == sum(p.numel() for p in model.parameters())
    assert len(shape.parts) == len(shape.layers)
    assert sum(parts.attention for parts in shape.parts) == sum(count for _, count in shape.masks)
    assert shape.recurrent is not None
    assert any(parts.recurrence for parts in shape.parts)
    assert shape.tileable == (family != "nemotron_h")


def test_what_layers_consist_of() -> None:
    falcon = shape_of("falcon_h1")[0]
    assert falcon.parts[0] == Parts(attention=True, recurrence=True, mlp=falcon.mlps[0])
    nemotron = shape_of("nemotron_h")[0]
    mamba, mlp, attention, _ = nemotron.parts
    assert mamba == Parts(attention=False, recurrence=True, mlp=None)
    assert mlp == Parts(attention=False, recurrence=False, mlp=nemotron.mlps[0])
    assert attention == Parts(attention=True, recurrence=False, mlp=None)
    qwen, _ = shape_of("qwen3_5_text")
    assert qwen.gated_attention
    assert qwen.head_norms  # which the first layer has not
    assert not shape_of("bamba")[0].gated_attention
    lfm2, _ = shape_of("lfm2")
    assert lfm2.recurrent is not None
    assert lfm2.recurrent.rule is None


@given(count=st.integers(1, 40))
def test_fewer_or_more_layers_keep_their_parts(count: int) -> None:
    shape = shape_of("qwen3_5_text")[0].with_layers(count)
    assert len(shape.layers) == len(shape.parts) == count
    assert sum(own for _, own in shape.masks) == sum(parts.attention for parts in shape.parts)


@given(
    family=st.sampled_from(["qwen3_5_text", "bamba", "jamba", "minimax"]),
    tokens=st.integers(1, 20000),
    ring=st.sampled_from([1, 2, 3]),
    ulysses=st.sampled_from([1, 2]),
    kernels=st.sampled_from(["fused", "torch"]),
)
def test_more_tokens_hold_more(family: str, tokens: int, ring: int, ulysses: int, kernels: str) -> None:
    """Of one document: of several, others may be cut when one is longer."""
    shape, _ = shape_of(family)
    uses = []
    for more in (0, 4096):
        run = RunShape(tokens + more, ring=ring, ulysses=ulysses, recurrent=kernels)
        uses.append(RecurrentUse.of(shape, run, H200))
    less, more_ = uses
    assert less is not None
    assert more_ is not None
    assert 0 < less.saved <= less.backward
    assert 0 < less.forward_seconds <= less.backward_seconds
    assert less.forward < more_.forward
    assert less.narrow < more_.narrow or not less.narrow


def test_a_recurrence_costs_per_token_and_is_computed_again() -> None:
    shape, _ = shape_of("qwen3_5_text")

    def planned_run(keep: str, **run: Any) -> Any:
        return Planner(shape, RunShape(**{"tokens": 8192, **run}), Limits(1000 * GIB), H200).settled({"keep": keep})

    one, two = (planned_run("all", tokens=tokens).time.items["recurrences"] for tokens in (8192, 16384))
    assert two == pytest.approx(2 * one)
    again = {keep: planned_run(keep).time.items.get("computed again", 0.0) for keep in ("all", "attention", "layer")}
    assert again["all"] == 0.0
    assert again["attention"] >= one / 3
    assert again["layer"] > again["attention"]
    # With attention's output kept, layers without attention keep their input alone.
    use = AttentionUse.of(shape, RunShape(8192), H200)
    kept = {keep: planned_run(keep).alive.layers.kept(4) for keep in ("attention", "layer")}
    assert kept["attention"] - kept["layer"] == 8192 * (2 * shape.query_width + 4 * shape.query_heads) + use.keys
    assert planned_run("layer").alive.peak("backward").items[RECURRENCE] > 0


@pytest.mark.parametrize(
    ("family", "told"),
    [("qwen3_5_text", "flash-linear-attention"), ("minimax", "flash-linear-attention"), ("bamba", "mamba-ssm"),
     ("jamba", "plain torch")],
)  # fmt: skip
def test_packages_have_kernels_that_keep_less_but_for_mamba_1(family: str, told: str) -> None:
    shape, _ = shape_of(family)
    fused, torch = (RecurrentUse.of(shape, RunShape(8192, recurrent=name), H200) for name in ("fused", "torch"))
    assert fused is not None
    assert torch is not None
    assert told in fused.told
    assert "plain torch" in torch.told
    assert (fused == torch) == (family == "jamba")
    assert fused.saved <= torch.saved
    assert fused.backward <= torch.backward


def test_degrees_are_chosen_with_recurrences_and_without_attention_too() -> None:
    shape, _ = shape_of("bamba", attn_layer_indices=[])
    assert not shape.masks
    asked = Planner(shape, RunShape(65536, ring=2, ulysses=2), Limits(1000 * GIB), H200)
    run = Ways(asked, FreeShape(degrees=True)).first.run
    assert run.ring * run.ulysses == 4
    assert AttentionUse.of(shape, run, H200).forward_seconds == 0.0


def test_a_plan_is_of_the_layout_that_the_recipe_has() -> None:
    shape, model = shape_of("qwen3_5_text")
    assert shape.mixing == weighed_layers(model)
    for lengths, policy in (((64,) * 4, "contiguous"), ((150, 7, 90), "balanced")):
        run, mesh = RunShape(sum(lengths), ring=2, lengths=lengths), MeshShape(ring=2, machine=H200)
        found = layout_of(shape, run, H200)
        assert found.positions == weighed_layout(Documents(lengths), mesh, layers=shape.mixing).positions
        assert found.resolved_policy == policy
        assert layout_of(shape, replace(run, policy="zigzag"), H200).policy == "zigzag"
    assert shape_of("lfm2")[0].mixing is None


def test_mlps_without_a_place_of_their_own_are_never_in_tiles() -> None:
    shape, _ = shape_of("nemotron_h")
    found = Planner(shape, RunShape(65536), Limits(1000 * GIB), H200).leanest({})
    assert found.memory.mlp_tile is None


def test_kernels_of_states_must_be_known() -> None:
    with pytest.raises(ValueError, match="recurrent must be fused or torch, got 'fast'"):
        RunShape(8, recurrent="fast")
