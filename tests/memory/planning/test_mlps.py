"""MLPs and experts: what the planner says they hold, against the storages that PyTorch makes and drops."""

from typing import Any

import pytest

pytest.importorskip("transformers")

from ringattn.hf.shape import model_shape
from ringattn.hf.tiny import read_config, tiny_config, tiny_model
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
