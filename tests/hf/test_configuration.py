"""Keys of configurations: refused where no rank can honour them, whenever they are set."""

import re
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from ringattn.hf import check_model, parallelize, shard_batch
from ringattn.hf.configuration import REFUSED
from ringattn.hf.tiny import read_config, tiny_config, tiny_model
from tests.hf.configuration_keys import INERT_KEYS, OF_REFUSED_TYPES, ROUTER_KEYS, SUSPICIOUS, TOKEN_KEYS
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

IDS = torch.arange(3, 19)[None]


def keys_of(kind: str) -> set[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return set(CONFIG_MAPPING[kind]().get_text_config().to_dict())
    except Exception:  # some configurations have no defaults
        return set(getattr(CONFIG_MAPPING[kind], "__dataclass_fields__", ()))


def test_every_suspicious_key_is_known() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = {*REFUSED, *TOKEN_KEYS, *ROUTER_KEYS, *INERT_KEYS, *OF_REFUSED_TYPES}
    found = {key for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES for key in keys_of(kind) if re.search(SUSPICIOUS, key)}
    assert found <= known, found - known


# A family that has the key, and a value that asks for something.
VALUES: dict[str, tuple[str, Any]] = {
    "add_cross_attention": ("gpt2", True),
    "alibi": ("llama", True),
    "chunk_size_feed_forward": ("llama", 8),
    "cross_attention_layers": ("llama", [1]),
    "decoder_layerdrop": ("llama", 0.1),
    "layerdrop": ("opt", 0.1),
    "output_attentions": ("llama", True),
    "ple_layer_ids": ("llama", [1]),
    "use_alibi": ("llama", True),
}


def asks(key: str, when: str) -> None:
    family, value = VALUES[key]
    model = tiny_model(tiny_config(read_config(family), num_hidden_layers=2))
    if when == "before":
        setattr(model.config, key, value)
    parallelize(model, mesh_of(2, 1))
    if when == "later":
        model(**shard_batch({"input_ids": IDS, "labels": IDS}, None, mesh_of(2, 1)))
    setattr(model.config, key, value)
    model(**shard_batch({"input_ids": IDS, "labels": IDS}, None, mesh_of(2, 1)))


@pytest.mark.parametrize("when", ["before", "after", "later"])
@pytest.mark.parametrize("key", REFUSED)
def test_refused_whenever_it_is_set(pool: Pools, key: str, when: str) -> None:
    words = f" has {key}=" if key != "output_attentions" or when == "before" else "output_attentions"
    with pytest.raises((NotImplementedError, ValueError), match=words):  # the latter is transformers' own
        pool(2).run(asks, key, when)


def test_statistics_of_a_batch() -> None:
    model = tiny_model(tiny_config(read_config("llama")))
    model.model.layers[1].mlp.norm = nn.BatchNorm1d(4)
    with pytest.raises(NotImplementedError, match=r"LlamaForCausalLM has BatchNorm1d at model.layers.1.mlp.norm"):
        check_model(model)
