"""A tiny model with each of PEFT's adapters, and how far it is from each document run alone."""

from typing import Any

import torch

from ringattn.hf.conformance import FORMS, Errors, alone, differences, together
from ringattn.hf.model import parallelize
from ringattn.hf.tiny import read_config, tiny_config, tiny_model
from tests.hf.families import GQA
from tests.parallel.ranks import mesh_of

FORM = FORMS[4]  # packed, padded tail
# A case is a type of PEFT's, with a colon and words where it has several; and what its configuration is given beside
# TARGETS. Nested configurations, under names of PEFT's classes, are made by `config_of`.
TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
BLOCKS = {"target_modules_bd_b": ["q_proj"], "nblocks": 2, "match_strict": False}
CASES: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4},
    "LORA: lora_bias, use_rslora": {"r": 4, "lora_bias": True, "use_rslora": True},
    "LORA: bias": {"r": 4, "bias": "lora_only"},
    "LORA: rank_pattern, alpha_pattern": {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 16}},
    "LORA: use_dora": {"r": 4, "use_dora": True},
    "LORA: target_modules of embeddings and head": {"r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "LORA: modules_to_save": {"r": 4, "modules_to_save": ["lm_head", "embed_tokens"]},
    "LORA: trainable_token_indices": {"r": 4, "trainable_token_indices": [14, 50, 8]},
    "LORA: target_parameters": {"r": 4, "target_parameters": ["mlp.experts.gate_up_proj"]},
    "LORA: init_lora_weights='mica'": {"r": 4, "init_lora_weights": "mica"},
    "LORA: init_lora_weights='pissa'": {"r": 4, "init_lora_weights": "pissa"},
    "LORA: use_qalora, qalora_group_size": {"r": 4, "use_qalora": True, "qalora_group_size": 8},
    "LORA: use_bdlora": {"r": 4, "use_bdlora": ("BdLoraConfig", BLOCKS)},
    "LORA: kasa_config": {"r": 4, "kasa_config": ("KasaConfig", {})},
    "LORA: velora_config": {"r": 4, "velora_config": ("VeloraConfig", {"num_groups": 4, "init_type": "random"})},
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
    "SUPERTUNING": {"sparsity": 0.9, "r": 4, "lora_alpha": 8},
    "TINYLORA": {"r": 2, "u": 8},
    "TRAINABLE_TOKENS": {"token_indices": [14, 50, 8], "target_modules": ["embed_tokens"]},
    "UNILORA": {"r": 4, "theta_d_length": 32},
    "VBLORA": {"r": 4, "num_vectors": 8, "vector_length": 16},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 20},
}
# Families other than qwen3: biases, experts, and what adaption prompts know.
FAMILY = {"LORA: bias": "qwen2", "LORA: target_parameters": "qwen3_moe", "ADAPTION_PROMPT": "llama"}
NEEDS = {"ADAMSS": "sklearn"}


def config_of(kind: str, **options: Any) -> Any:
    """A configuration of PEFT's, by the name of its type."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.tuners.lora import config as nested

    made = {
        name: getattr(nested, value[0])(**value[1]) if isinstance(value, tuple) else value
        for name, value in options.items()
    }
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](task_type="CAUSAL_LM", **made)


def base_model(family: str = "qwen3") -> Any:
    return tiny_model(tiny_config(read_config(family), **({} if family == "qwen3_moe" else GQA)))


def adapted(kind: str, family: str = "qwen3", **options: Any) -> Any:
    """A tiny model with an adapter, both equal on every rank; what an adapter starts with is often zero: not here."""
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(base_model(family), config_of(kind, **options))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


def measured(case: str) -> Errors:
    """How far a case is from each document run alone, in the mode that it is trained in. Collective."""
    kind = case.partition(":")[0]
    model = adapted(kind, FAMILY.get(case, "qwen3"), **{**TARGETS, **CASES[case]})
    model.train(kind != "PVERA")  # its noise is drawn for each token, so that no two runs are alike
    truth = alone(model, FORM)
    assert all(gradient.any() for gradient in truth.gradients.values())
    model.zero_grad()
    parallelize(model, mesh_of(2, 1))
    return differences(together(model, mesh_of(2, 1), FORM, "zigzag"), truth)
