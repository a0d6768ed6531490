"""Which models can be exact: what a model's configuration and layers need, checked before anything is installed.

A refusal is a NotImplementedError with the model's name and what it has. A model on the meta device is enough.
"""

import inspect
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from ringattn.hf.configuration import check_configuration
from ringattn.hf.local_draws import check_draws
from ringattn.hf.recurrent import BOTH, NEITHER, RecurrentLayers, recurrent_layers
from ringattn.hf.recurrent import LAYER_TYPES as STATE_TYPES

LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
# Heads that treat each token alone. Others pool over a sequence, of which a rank sees a part.
HEADS = ("Model", "ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForImageTextToText")
# Layers that carry something from token to token, by a part of their class's name.
RECURRENT = re.compile("Mamba|Recurrent|Rwkv|SSM|DeltaNet|LinearAttention|LightningAttention|ShortConv|NGram")
# Classes that are called so after their family: norms, and Kimi Linear's layers of full attention.
NAMESAKES = re.compile("Norm$|^KimiLinearAttention$")
# Attention layers that count positions themselves, and what is done about it.
COUNTING = {"Llama4TextAttention": "see length_limits"}


@dataclass(frozen=True)
class LengthLimit:
    """A feature that changes with the length of what one call sees, and so would differ between ranks.

    Arguments:
        name: the key of the configuration.
        longest: documents of at most this many tokens do not touch it.
        local: so does a rank's share of tokens (True), whatever its documents.
    """

    name: str
    longest: int
    local: bool = False


def check_decoder(config: Any, whole: bool) -> None:
    """Raises NotImplementedError unless AutoModelForCausalLM builds a decoder from a configuration, or (not `whole`)
    from the text part of it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if not whole and not config.is_encoder_decoder:
        config = config.get_text_config()
    name = type(config).__name__
    if config.is_encoder_decoder:
        raise NotImplementedError(f"{name} is of an encoder-decoder; only decoders are supported")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise NotImplementedError(f"{name} is of no causal language model of transformers; only decoders are supported")


def check_model(model: Any) -> int:
    """The number of attention layers of a transformers model, which may be on the meta device.

    Layers that carry a state are none of them. Raises NotImplementedError naming what is not supported.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise NotImplementedError(f"{name} is an encoder-decoder; only decoders are supported")
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    if other := sorted(set(layer_types) - LAYER_TYPES - STATE_TYPES - BOTH - NEITHER):
        raise NotImplementedError(
            f"{name} has layers of type {', '.join(other)}, which cannot be split over a sequence"
        )
    text = text_model(model)
    states = recurrent_layers(text)
    _check_states(name, layer_types, states)
    for path, layer in text.named_modules():
        kind = type(layer).__name__
        if states.holds(path) or (not path and states.layers):
            continue
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise NotImplementedError(f"{name} has {kind} at {path}: its statistics are of a rank's tokens alone")
        if isinstance(layer, nn.Conv1d | nn.RNNBase) or (RECURRENT.search(kind) and not NAMESAKES.search(kind)):
            raise NotImplementedError(
                f"{name} has {kind} at {path}, which carries something from token to token and cannot be split over a "
                "sequence"
            )
    # Hybrids leave that flag out; their attention is counted as that of all models.
    if not states.layers and not (text._supports_attention_backend and model._supports_attention_backend):
        raise NotImplementedError(f"{name} computes its attention itself, outside transformers' AttentionInterface")
    if not name.endswith(HEADS) or "DoubleHeads" in name:
        raise NotImplementedError(
            f"{name} has a head that may look at a whole sequence; supported are heads that treat each token alone: "
            f"*{', *'.join(HEADS)}"
        )
    _check_placement(name, model)
    check_configuration(model)
    check_draws(model)
    _check_positions(name, text)
    return sum(kind in LAYER_TYPES | BOTH for kind in layer_types)


def _check_states(name: str, layer_types: list[str], states: RecurrentLayers) -> None:
    """Every layer that the configuration says has a state must be one that is known."""
    stated = [kind for kind in layer_types if kind in STATE_TYPES | BOTH]
    if len(stated) > len(states.layers):
        raise NotImplementedError(
            f"{name} has {len(stated)} layers of type {', '.join(sorted(set(stated)))}, of which ringattn knows "
            f"{len(states.layers)}: the others cannot be split over a sequence"
        )


def text_model(model: Any) -> Any:
    """The module of a multimodal model that holds the decoder of its text configuration; else the model itself."""
    config = model.config.get_text_config()
    if config is model.config:
        return model
    from transformers import PreTrainedModel

    found = [part for part in model.modules() if isinstance(part, PreTrainedModel) and part.config is config]
    if not found:
        raise NotImplementedError(f"{type(model).__name__} has no module for its {type(config).__name__}")
    return found[0]


def length_limits(config: Any) -> list[LengthLimit]:
    """The limits of a text model's configuration: within them a rank computes what one process would."""
    limits = []
    for parameters in _rope_parameters(config):
        kind = parameters.get("rope_type", parameters.get("type"))
        if kind == "longrope" or (isinstance(kind, str) and "dynamic" in kind):
            key = "original_max_position_embeddings"
            longest = parameters.get(key) or getattr(config, key, None) or config.max_position_embeddings
            limits.append(LengthLimit(f"rope_type={kind!r}", int(longest)))
    if getattr(config, "attn_temperature_tuning", False):
        # scaled by floor((position + 1) / floor_scale), positions counted in what the call sees
        limits.append(LengthLimit("attn_temperature_tuning", int(config.floor_scale) - 1, local=True))
    return limits


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """The rotary settings of a configuration: one dictionary, or one for each layer type."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested if nested else [parameters]


def _check_placement(name: str, model: Any) -> None:
    """Every rank must hold whole layers on its one device: attention's heads and losses are counted by it."""
    if (size := getattr(model, "_tp_size", None)) is not None and size > 1:
        raise NotImplementedError(
            f"{name} is tensor parallel over {size} ranks (tp_plan, or a distributed_config): its ranks hold parts of "
            "the heads and all of the tokens, and cannot share the tokens too; load it without"
        )
    devices = set(map(str, getattr(model, "hf_device_map", {}).values()))
    if len(devices) > 1:
        raise NotImplementedError(
            f"{name} is spread over the devices {', '.join(sorted(devices))} (device_map): a rank has one device; load "
            "it without device_map, and shard its parameters over ranks with FSDP or DeepSpeed"
        )


def _check_positions(name: str, text: Any) -> None:
    """Positions must come from outside: a rank's tokens are anywhere in their documents."""
    inner = text.base_model if hasattr(text, "base_model") else text
    placed = any(re.search("Rotary|Position", type(layer).__name__) for layer in text.modules())
    if "position_ids" not in inspect.signature(inner.forward).parameters and (placed or _attends(text)):
        raise NotImplementedError(f"{name} takes no position_ids: it counts the positions of a rank's tokens from 0")
    for path, layer in text.named_modules():
        kind = type(layer).__name__
        if hasattr(layer, "create_position_ids_from_input_ids"):
            raise NotImplementedError(
                f"{name} counts positions in {kind} at {path} from the padding id + 1 (as RoBERTa does), which is not "
                "supported"
            )
        if "Attention" in kind and kind not in COUNTING and "arange(" in _source(type(layer).forward):
            raise NotImplementedError(
                f"{name} counts positions in {kind} at {path}, from 0 on every rank; they must come from position_ids"
            )


def _attends(text: Any) -> bool:
    """Whether a model has attention layers, which need positions as a rule; Mamba-2 has neither."""
    return any("Attention" in type(layer).__name__ for layer in text.modules())


def _source(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""
