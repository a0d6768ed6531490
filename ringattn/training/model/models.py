"""Models from transformers: a small Llama, the shapes of Llama-3.1-8B and Qwen3-8B, or a local checkpoint."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ringattn.training.model.architecture import configured
from ringattn.training.model.freezing import freeze
from ringattn.training.model.lora import Lora, put_lora
from ringattn.training.model.pretrained import load_weights


def model_config(family: str | None, path: str | None, overrides: Mapping[str, Any]) -> Any:
    """The configuration of `configured` alone."""
    return configured(family, path, overrides)[0]


def build_model(
    config: Any,
    seed: int,
    path: str | None = None,
    allow: Sequence[str] = (),
    lora: Lora | None = None,
    frozen: Sequence[str] = (),
) -> nn.Module:
    """The whole model in float32 on the CPU: with weights drawn from `seed`, or those of the checkpoint at `path`.

    Same seed, same weights, whatever the number of ranks or the engine, those that a checkpoint lacks (by patterns of
    `allow`, see `load_weights`) included, and the factors of `lora`: those that PEFT draws right after
    `torch.manual_seed(seed)`. The caller's random state is not touched. What matches a pattern of `frozen` is not
    trained.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if path is not None:
            model = load_weights(config, path, allow)[0]
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if lora is not None:
            torch.manual_seed(seed)
            put_lora(model, lora)
    freeze(model, frozen)
    return model


def empty_model(config: Any, lora: Lora | None = None, frozen: Sequence[str] = ()) -> nn.Module:
    """The model on the meta device: its shape without its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if lora is not None:
        put_lora(model, lora)
    freeze(model, frozen)
    return model


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices with weight decay; norms, biases and scalars without, where such are trained."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
