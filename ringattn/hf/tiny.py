"""Tiny models of any family: the structure of a configuration, its layer types and features, at sizes for seconds.

Default initialisation is so small that windows and sinks hardly show; weights are drawn wider here.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

# Sizes by the names that configurations give them; a name that a configuration lacks, or has as None, is left out.
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "vocab_size_per_layer_input": 97,
    "hidden_size": 64,
    "n_embd": 64,
    "word_embed_proj_dim": 64,
    "hidden_size_per_layer_input": 16,
    "intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "ffn_dim": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_attention_heads": 4,
    "n_head": 4,
    "head_dim": 16,
    "global_head_dim": 32,
    "swa_head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window": 5,
    "attention_chunk_size": 8,
    "attn_logit_softcapping": 2.0,
    "query_pre_attn_scalar": 24,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "max_window_layers": 2,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 12,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_ssm": 128,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "mamba_n_groups": 2,
    "ssm_state_size": 8,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
}
# Random parts, and what would make a rank's tokens depend on others' for other reasons than attention.
OFF: dict[str, Any] = {
    "attention_dropout": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "hidden_dropout": 0.0,
    "embd_dropout": 0.0,
    "embedding_dropout": 0.0,
    "residual_dropout": 0.0,
    "resid_dropout": 0.0,
    "dropout": 0.0,
    "layerdrop": 0.0,
    "use_cache": False,
    "output_router_logits": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def read_config(source: str) -> Any:
    """The configuration at a folder or config.json file, or the default one of a model type ("gpt_oss").

    Raises ValueError if there is no such thing. Nothing is downloaded.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = Path(source).expanduser()
    try:
        if path.is_file() or (path / "config.json").is_file():
            # Without the question whether code of the folder may run, which waits for an answer.
            return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if source in CONFIG_MAPPING:
            return AutoConfig.for_model(source)
    except Exception as error:  # transformers raises of all kinds, from validators of single fields too
        told = " ".join(str(error).split())
        raise ValueError(f"{source!r} cannot be read as a configuration: {type(error).__name__}: {told}") from error
    raise ValueError(
        f"expected a folder with a config.json, such a file, or a model type of transformers, got {source!r}"
    )


def tiny_config(config: Any, **changes: Any) -> Any:
    """A tiny configuration of the same class, of its text part: same features, every layer type of the first layers."""
    config = config.get_text_config()
    given = config.to_dict()
    layers = _layers(config)
    sizes = {key: value for key, value in SIZES.items() if given.get(key) is not None}
    sizes |= {key: value for key, value in OFF.items() if key in given}
    sizes["n_layer" if "n_layer" in given else "num_hidden_layers"] = layers
    if "head_dim" in given:
        sizes["head_dim"] = SIZES["head_dim"]
    if (keys := given.get("num_key_value_heads")) is not None:
        sizes["num_key_value_heads"] = 4 if keys == given.get("num_attention_heads") else 2
    if "qk_rope_head_dim" in sizes and "head_dim" in sizes:  # of the rotary part alone, in families with latent keys
        sizes["head_dim"] = sizes["qk_rope_head_dim"]
    if given.get("num_experts_per_tok") == 1:
        sizes["num_experts_per_tok"] = 1
    for key, value in given.items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers and key not in changes:
            sizes[key] = value[:layers]
    if "per_layer_config" in given:  # Gemma 4: wider heads in some layers
        sizes["per_layer_config"] = {
            int(layer): {key: SIZES["global_head_dim"] if key == "head_dim" else value for key, value in own.items()}
            for layer, own in given["per_layer_config"].items()
            if int(layer) < layers
        }
    kept = {key: value for key, value in given.items() if key not in ("model_type", "transformers_version", "dtype")}
    return type(config)(**{**kept, **sizes, **changes})


def tiny_model(config: Any, seed: int = 0) -> nn.Module:
    """A float32 model with weights of N(0, 0.12) and sinks of N(0, 1), in evaluation mode."""
    from transformers import AutoModelForCausalLM

    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, std=1.0 if name.endswith("sinks") else 0.12)
    return model.eval()


def with_parameters_in(model: Any, dtype: torch.dtype) -> Any:
    """Casts the parameters, in place, and no buffers: rotary frequencies of 8 bits would turn long positions."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _layers(config: Any) -> int:
    """Four layers, or as many more as it takes to meet every layer type twice (once for a rare one)."""
    types = getattr(config, "layer_types", None)
    if not types:
        return min(4, config.num_hidden_layers)
    first = {kind: types.index(kind) for kind in set(types)}
    return min(len(types), max(4, 1 + max(first.values())))
