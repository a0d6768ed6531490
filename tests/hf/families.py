"""The families of the conformance matrix, as tiny random models: a model type and what differs from its defaults."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any
from unittest.mock import patch

from ringattn.documents import Documents
from ringattn.parallel.placement import policies

WINDOW = {"sliding_window": 5}
GQA = {"num_key_value_heads": 2}  # where the default has as many key heads as query heads
# What the delta rule gives of a document's first token is the product of its query and key, which may be near 0; the
# norm that follows would magnify roundings of float32 without limit.
EPS = {"rms_norm_eps": 1e-3}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GQA,
    "qwen3": GQA,
    "qwen3_moe": {},
    "qwen2": GQA | WINDOW | {"use_sliding_window": True, "layer_types": None},
    "qwen2_moe": GQA | WINDOW | {"use_sliding_window": True, "layer_types": None},
    "mistral": {},
    "phi3": GQA | WINDOW,
    "phimoe": WINDOW,
    "starcoder2": WINDOW,
    "mixtral": WINDOW,
    "gemma2": {},
    "vaultgemma": {},
    "gemma3_text": {},
    "gemma4_text": {},
    "olmo2": GQA,
    "olmo3": GQA,
    "cohere2": GQA,
    "exaone4": GQA,
    "modernbert-decoder": {},
    "gpt_oss": {},
    "granite_swa": {},
    "mimo_v2_flash": {},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v3": {},
    "llama4_text": {},
    "smollm3": {},
    "glm4": {},
    "granite": GQA,
    "gpt2": {},
    "gpt_neox": {},
    "opt": {},
    # Layers that carry a state, most of them beside attention.
    "qwen3_next": EPS,
    "qwen3_5_text": EPS,
    "qwen3_5_moe_text": EPS,
    "olmo_hybrid": {"linear_num_key_heads": 4},
    "kimi_linear": {},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv", "conv"],
        "num_dense_layers": 1,
        "num_experts_per_tok": 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 8},
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"]},
    "falcon_h1": {},
    "nemotron_h": {"n_groups": 2},
    "jamba": {},
    "minimax": {"block_size": 4},
}
# Refused where transformers does not call their attention through its AttentionInterface: GPT-J before 5.24.
LATER: dict[str, dict[str, Any]] = {"gptj": {"rotary_dim": 8}}
SINCE = {"gptj": " (before transformers 5.24; since then it is exact)"}
# Meshes as (ring, ulysses, policy, scheme).
MESHES: dict[str, tuple[int, int, str, str]] = {
    "1 rank": (1, 1, "auto", "auto"),
    "ring 2": (2, 1, "contiguous", "ring"),
    "zigzag 2": (2, 1, "zigzag", "auto"),
    "ulysses 2": (1, 2, "auto", "ulysses"),
    "hybrid 2×2": (2, 2, "contiguous", "hybrid"),
    "empty rank": (2, 1, "contiguous", "gather"),  # see `placed_on`
}


@contextmanager
def placed_on(mesh: str) -> Iterator[None]:
    """On the mesh "empty rank" the second position holds every token and the first none; else without effect."""

    def on_the_second(docs: Documents, load: policies.Load, ring: int) -> policies.Positions:
        return (), *policies.zigzag(docs, load, 1), *[()] * (ring - 2)

    with patch.object(policies, "contiguous", on_the_second) if mesh == "empty rank" else nullcontext():
        yield


@cache
def model_of(family: str) -> Any:
    """The family's tiny model; kept, so who changes it must change it back."""
    from ringattn.hf.tiny import read_config, tiny_config, tiny_model

    return tiny_model(tiny_config(read_config(family), **(FAMILIES | LATER)[family]))
