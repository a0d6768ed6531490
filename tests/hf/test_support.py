"""Models that are refused before anything is read, by what they would need."""

import pytest

pytest.importorskip("transformers")


from tests.hf import one_layer
from tests.pool import Pools


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("MptForCausalLM", {"d_model": 64, "n_layers": 2, "n_heads": 4}, "outside transformers"),
        ("T5ForConditionalGeneration", {"d_model": 32, "num_layers": 2, "num_heads": 2}, "encoder-decoder"),
    ],
)
def test_models_with_a_bias_are_refused(pool: Pools, family: str, config: dict[str, object], words: str) -> None:
    with pytest.raises(NotImplementedError, match=f"{family}.*{words}"):
        pool(1).run(one_layer.refused, family, config)


def test_layers_with_a_state_that_are_not_known_are_refused(pool: Pools) -> None:
    config: dict[str, object] = {"num_hidden_layers": 4, "hidden_size": 64}
    with pytest.raises(NotImplementedError, match="4 layers of type linear_attention, of which ringattn knows 0"):
        pool(1).run(one_layer.refused, "MambaForCausalLM", config)
