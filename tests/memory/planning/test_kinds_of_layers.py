"""Norms, layers and heads of their own kinds, as planned, against the storages that PyTorch makes and drops."""

from typing import Any

import pytest

pytest.importorskip("transformers")

from torch import nn

from ringattn.hf.layer_parts import norms_of
from ringattn.hf.layers import decoder_layers
from ringattn.hf.norm_probe import norm_kind
from ringattn.hf.shape import model_shape
from ringattn.hf.tiny import read_config, tiny_config, tiny_model
from ringattn.memory.planning.parts import NormKind
from ringattn.memory.planning.shapes import ModelShape
from ringattn.training.model.models import empty_model
from tests.memory.planning.measured import compared
from tests.pool import Pools


def tiny(family: str) -> tuple[Any, Any]:
    config = tiny_config(read_config(family), vocab_size=256)
    return tiny_model(config).train(), config


def shape_of(family: str) -> ModelShape:
    config = tiny_config(read_config(family))
    return model_shape(empty_model(config), config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["phi", "cohere"])
def test_attention_and_mlp_with_one_norm(pool: Pools, family: str, dtype: str) -> None:
    """A second norm was planned, and of Cohere's too little: 95 to 116 % of what is measured."""
    (found,) = pool(1).run(compared, tiny, (family,), dtype, ["plain", "layer", "attention"], [512])
    wrong = [one for one in found if one[2] != pytest.approx(1.0, abs=0.05) and ("backward" in one or "plain" in one)]
    assert not wrong, found


@pytest.mark.parametrize("family", ["granite", "gemma2"])
def test_what_is_done_to_logits(pool: Pools, family: str) -> None:
    """A factor was planned as a copy that stays, and three steps of a softcap as three: 105 % of what is measured."""
    (found,) = pool(1).run(compared, tiny, (family,), "float32", ["plain"], [512])
    wrong = [one for one in found if one[2] != pytest.approx(1.0, abs=0.01)]
    assert not wrong, found
    assert shape_of(family).logits_kept == (family == "gemma2")


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", NormKind()),
        ("gemma3_text", NormKind(wide=True)),
        ("nemotron_h", NormKind(wide=True)),
        ("cohere2", NormKind(wide=True, centred=True)),
        ("starcoder2", NormKind(kernel=True)),
    ],
)
def test_what_norms_keep(family: str, kind: NormKind) -> None:
    config = tiny_config(read_config(family))
    norms = norms_of(decoder_layers(empty_model(config))[0])
    assert norm_kind(norms[0], config.hidden_size) == kind


def test_a_norm_that_does_not_run_is_a_plain_one() -> None:
    class Norm(nn.Module):
        def forward(self, x: Any) -> None:
            raise RuntimeError("not here")

    assert norm_kind(Norm(), 64) == norm_kind(None, 64) == NormKind()


def test_layers_with_one_norm() -> None:
    assert all(parts.together for parts in shape_of("cohere2").parts)
    assert not any(
        parts.together for family in ("llama", "nemotron_h", "qwen3_5_text") for parts in shape_of(family).parts
    )
