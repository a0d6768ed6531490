"""MLPs and experts: what the planner says they hold, against the storages that PyTorch makes and drops."""

from typing import Any

import pytest

pytest.importorskip("transformers")

from ringattn.hf.expert_probe import held_by_gradients, kept_by_activation, kept_by_gate, router_dtypes
from ringattn.hf.shape import model_shape
from ringattn.hf.tiny import read_config, tiny_config, tiny_model
from ringattn.memory.planning.mlp import MlpUse
from ringattn.memory.planning.parts import Mlp, Weights
from ringattn.memory.settings import MemorySettings
from ringattn.training.model.models import empty_model
from tests.memory.planning.measured import compared
from tests.pool import Pools

SOME = ["plain", "layer", "attention"]
# Dense layers and such with experts, the one far wider than the other.
MIXED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"intermediate_size": 448, "first_k_dense_replace": 2},
    "mimo_v2_flash": {},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv", "conv"], "num_dense_layers": 2, "intermediate_size": 448,
    },
    "nemotron_h": {},
}  # fmt: skip


def tiny(family: str, changes: dict[str, Any]) -> tuple[Any, Any]:
    config = tiny_config(read_config(family), vocab_size=256, **changes)
    return tiny_model(config).train(), config


@pytest.mark.slow
@pytest.mark.parametrize("family", MIXED)
def test_layers_have_their_own_mlps(pool: Pools, family: str) -> None:
    """The widest was taken for all: up to 1.6 times of what is measured."""
    (found,) = pool(1).run(compared, tiny, (family, MIXED[family]), "float32", SOME, [512])
    wrong = [one for one in found if one[2] != pytest.approx(1.0, abs=0.03)]
    assert not wrong, found


def test_widths_by_layer() -> None:
    config = tiny_config(read_config("deepseek_v3"), **MIXED["deepseek_v3"])
    shape = model_shape(empty_model(config), config)
    assert [(mlp.inner, mlp.routed) for mlp in shape.mlps] == [(448, 0), (448, 0), (96, 2), (96, 2)]
    config = tiny_config(read_config("nemotron_h"))
    assert [parts.mlp is not None for parts in model_shape(empty_model(config), config).parts] == [False, True] * 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_clamped_gates_and_biases_of_experts(pool: Pools, dtype: str) -> None:
    """gpt-oss keeps seven tensors of inner rows where others keep four, and copies biases for each token: 57 to 79 % of
    what is measured was planned."""
    names = ["plain", "layer", "attention", "selective", "layer, MLP"]
    (found,) = pool(1).run(compared, tiny, ("gpt_oss", {}), dtype, names, [512])
    tiled = dtype == "bfloat16"  # for whose loss a CPU makes float32 copies
    wrong = [one for one in found if one[2] != pytest.approx(1.0, abs=0.02)]
    wrong = [one for one in wrong if not (tiled and one[:2] == ("layer, MLP", "forward"))]
    assert not wrong, found


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v3", "mimo_v2_flash", "mixtral", "qwen2_moe", "hunyuan_v1_moe"])
def test_weights_of_experts_in_float32(pool: Pools, family: str) -> None:
    """By which in bfloat16 what experts give becomes float32; and shared experts by their own widths: 74 to 96 % of
    what is measured was planned."""
    (found,) = pool(1).run(compared, tiny, (family, {}), "bfloat16", SOME, [512])
    wrong = [one for one in found if not 0.98 < one[2] < 1.045]
    assert not wrong, found


@pytest.mark.parametrize(
    ("family", "kept", "wide"),
    [
        ("gpt_oss", 7, (False, False)),
        ("deepseek_v3", 4, (True, True)),
        ("mixtral", 4, (False, True)),
        ("qwen3_moe", 4, (False, False)),
    ],
)
def test_what_gates_and_routers_keep(family: str, kept: int, wide: tuple[bool, bool]) -> None:
    model = empty_model(tiny_config(read_config(family)))
    mlp = model.get_submodule("model.layers.3.mlp")
    experts = mlp.get_submodule("experts")
    assert kept_by_gate(experts) == kept
    assert router_dtypes(mlp, experts) == wide
    assert not experts._forward_pre_hooks


def test_experts_that_are_computed_in_other_ways_are_refused() -> None:
    config = tiny_config(read_config("gpt_oss"))
    model = empty_model(config)
    config._experts_implementation = "batched_mm"
    with pytest.raises(NotImplementedError, match="experts_implementation='batched_mm' is not planned"):
        model_shape(model, config)


def test_products_of_experts_are_no_kernel_of_their_own() -> None:
    """Compiled are gated MLPs, whose activation is not kept then."""
    rows = 512 * 96 * 2

    def saved(routed: int, fused: bool) -> int:
        part = Mlp(Weights(1, 1), 96, joined=bool(routed), routed=routed)
        return MlpUse(part, 64, 512, 2, MemorySettings(), fused).saved

    assert saved(0, False) - saved(0, True) == rows
    assert saved(2, False) == saved(2, True)


@pytest.mark.parametrize(
    ("name", "kept", "back"), [("gelu", 2, 3), ("relu", 1, 3), ("relu2", 2, 5), ("gelu_new", 5, 7)]
)
def test_activations_of_several_operators(name: str, kept: int, back: int) -> None:
    from transformers.activations import ACT2FN

    assert kept_by_activation(ACT2FN[name]) == kept
    assert held_by_gradients(ACT2FN[name]) == back


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_that_are_one_kernel(pool: Pools, dtype: str) -> None:
    """StarCoder2's are torch's LayerNorm, without float32 copies: up to 146 % of what is measured was planned."""
    (found,) = pool(1).run(compared, tiny, ("starcoder2", {}), dtype, SOME, [512])
    wrong = [one for one in found if one[2] != pytest.approx(1.0, abs=0.02) and ("backward" in one or "plain" in one)]
    assert not wrong, found


def with_router_loss(family: str) -> tuple[Any, Any]:
    """So many experts that their logits show."""
    config = tiny_config(read_config(family), vocab_size=256, num_experts=64, output_router_logits=True)
    return tiny_model(config).train(), config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_routers_whose_loss_counts(pool: Pools, dtype: str) -> None:
    (found,) = pool(1).run(compared, with_router_loss, ("qwen3_moe",), dtype, ["plain"], [512])
    wrong = [one for one in found if one[2] != pytest.approx(1.0, abs=0.05)]
    assert not wrong, found
