"""Models from transformers: a small Llama, the shapes of Llama-3.1-8B and Qwen3-8B, or a local checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

# The configuration class and the architecture of each `model.family`.
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
}


def model_config(family: str, path: str | None, overrides: Mapping[str, Any]) -> Any:
    """The transformers configuration: of a local checkpoint if `path` is given, else of a family; then the overrides.

    Raises ValueError for a family, a folder or a key of the configuration that does not exist.
    """
    import transformers

    if path is not None:
        folder = Path(path).expanduser()
        if not (folder / "config.json").is_file():
            raise ValueError(f"model.path={path!r} holds no config.json; it must be the folder of a saved model")
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    elif family in FAMILIES:
        config = getattr(transformers, FAMILIES[family][0])()
    else:
        raise ValueError(f"model.family must be one of {sorted(FAMILIES)}, got {family!r}")
    for key, value in overrides.items():
        if not hasattr(config, key):
            raise ValueError(f"model.config.{key}: {type(config).__name__} has no such key")
        setattr(config, key, value)
    if path is None:  # derived fields (head_dim, layer types) are computed from the final values
        config = type(config)(**{**dict(overrides)})
    config.use_cache = False  # a cache makes stock packing leak across documents
    return config


def build_model(config: Any, seed: int, path: str | None = None) -> nn.Module:
    """The whole model in float32 on the CPU: with weights drawn from `seed`, or those of the checkpoint at `path`.

    Same seed, same weights, whatever the number of ranks or the engine; the caller's random state is not touched.
    """
    from transformers import AutoModelForCausalLM

    if path is not None:
        folder = Path(path).expanduser()
        return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32, local_files_only=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def empty_model(config: Any) -> nn.Module:
    """The model on the meta device: its shape without its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The repeated layers, which engines shard and checkpoint one by one. Raises ValueError if they cannot be found."""
    wanted = model.config.get_text_config().num_hidden_layers  # type: ignore[operator, union-attr]
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == wanted]
    if not found:
        raise ValueError(f"{type(model).__name__} has no list of {wanted} decoder layers")
    return max(found, key=lambda layers: sum(p.numel() for p in layers.parameters()))


def checkpoint_layers(model: nn.Module) -> None:
    """Wraps every decoder layer so that the backward pass computes it again instead of keeping what is inside."""
    layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer, CheckpointImpl.NO_REENTRANT)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups: matrices with weight decay; norms, biases and scalars without."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
