"""A tiny model with each of PEFT's adapters, drawn wide: what the table of docs/peft.md is measured on."""

from collections.abc import Callable
from typing import Any

import torch

from ringattn.hf.tiny import read_config, tiny_config, tiny_model
from tests.hf.families import GQA

LINEAR = ["q_proj", "v_proj", "down_proj"]
# A case is a type of PEFT's, with a colon and a name where there are several; and what its configuration is given.
# `target_modules` are LINEAR unless a case says other ones.
CASES: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4},
    "LORA: lora_bias, rslora": {"r": 4, "lora_bias": True, "use_rslora": True},
    "LORA: use_dora": {"r": 4, "use_dora": True},
    "LORA: embeddings and head": {"r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "LORA: modules_to_save": {"r": 4, "modules_to_save": ["lm_head", "embed_tokens"]},
    "LORA: trainable_token_indices": {"r": 4, "trainable_token_indices": [5, 6, 7]},
    "LORA: bias": {"r": 4, "bias": "lora_only"},
    "LORA: rank_pattern": {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 16}},
    "LORA: pissa": {"r": 4, "init_lora_weights": "pissa"},
    "LORA: olora": {"r": 4, "init_lora_weights": "olora"},
    "LORA: orthogonal": {"r": 4, "init_lora_weights": "orthogonal"},
    "LORA: mica": {"r": 4, "init_lora_weights": "mica"},
    "LORA: use_qalora": {"r": 4, "use_qalora": True, "qalora_group_size": 8},
    "LORA: use_bdlora": {"r": 4, "use_bdlora": {"target_modules_bd_b": ["q_proj"], "nblocks": 2, "match_strict": False}},
    "LORA: kasa_config": {"r": 4},
    "LORA: velora_config random": {"r": 4},
    "LORA: layer_replication": {"r": 4, "layer_replication": [[0, 3], [1, 4]]},
    "LORA: target_parameters": {"r": 4, "target_parameters": ["mlp.experts.gate_up_proj"]},
    "ADALORA": {"init_r": 4, "total_step": 10, "orth_reg_weight": 0.0},
    "ADAMSS": {"r": 8, "num_subspaces": 2},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 2, "target_modules": None},
    "BEFT": {},
    "BOFT": {"boft_block_size": 4, "boft_n_butterfly_factor": 2},
    "C3A": {"block_size": 16},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 20},
    "FROD": {"progressbar": False},
    "GLORA": {"r": 4},
    "GRALORA": {"r": 4},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LILY": {"r": 4},
    "LN_TUNING": {"target_modules": ["input_layernorm", "q_norm"]},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 8},
    "OSF": {"effective_rank": 4},
    "PEANUT": {"r": 4, "depth": 2},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4, "random_seed": 1},
    "SUPERTUNING": {"sparsity": 0.9},
    "SUPERTUNING: r": {"sparsity": 0.9, "r": 4, "lora_alpha": 8},
    "TINYLORA": {"r": 2, "u": 8},
    "TRAINABLE_TOKENS": {"token_indices": [5, 6, 7], "target_modules": ["embed_tokens"]},
    "UNILORA": {"r": 4, "theta_d_length": 32},
    "VBLORA": {"r": 4, "num_vectors": 8, "vector_length": 16},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 20},
}
