"""A transformers model as the planner of memory sees it. The meta device is enough.

Parameters are counted; what a layer computes is taken from the configuration.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from ringattn.hf.head import steps_after_head
from ringattn.hf.layers import decoder_layers
from ringattn.hf.recurrent import BOTH, LAYER_TYPES, NEITHER
from ringattn.mask import Mask
from ringattn.memory.planning.shapes import ModelShape, Weights


def model_shape(model: nn.Module, config: Any, name: str = "") -> ModelShape:
    """The shape of a model with its configuration.

    Raises NotImplementedError for layers that are not attention and an MLP, ValueError if there are none.
    """
    text = config.get_text_config()
    if others := sorted(set(getattr(text, "layer_types", None) or ()) & (LAYER_TYPES | BOTH | NEITHER)):
        raise NotImplementedError(f"{text.model_type} has layers of {', '.join(others)}: the planner knows attention")
    layers = decoder_layers(model)
    embedding, head = (getattr(model, f"get_{one}_embeddings")() for one in ("input", "output"))
    tied = head is not None and head.weight is embedding.weight
    inside = {id(p) for layer in layers for p in layer.parameters()}
    inside |= {id(p) for one in (embedding, head) if one is not None for p in one.parameters()}
    largest = max((_mlp(layer) for layer in layers), key=lambda mlp: sum(p.numel() for p in mlp.parameters()))
    heads = text.num_attention_heads
    return ModelShape(
        name=name or text.model_type,
        hidden=text.hidden_size,
        inner=_inner(text),
        query_heads=heads,
        key_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocabulary=text.vocab_size,
        layers=tuple(_weights(layer.parameters()) for layer in layers),
        mlp=_weights(largest.parameters()),
        active=sum(_active(layer, text) for layer in layers) // len(layers),
        embedding=_weights(embedding.parameters()),
        head=Weights(0, 0, 0) if tied or head is None else _weights(head.parameters()),
        rest=_weights(p for p in model.parameters() if id(p) not in inside),
        masks=layer_masks(text),
        gated=any("gate" in name or "w1" in name for name, _ in largest.named_parameters()),
        head_norms=any(name.endswith(("q_norm.weight", "k_norm.weight")) for name, _ in layers[0].named_parameters()),
        logit_steps=_logit_steps(model, head),
    )


def _weights(parameters: Iterable[nn.Parameter]) -> Weights:
    every = list(parameters)
    return Weights(sum(p.numel() for p in every), sum(p.numel() for p in every if p.requires_grad), len(every))


def _logit_steps(model: nn.Module, head: Any) -> int:
    """Things that a model does to its logits; 0 where that cannot be seen, and no loss is tiled."""
    try:
        return len(steps_after_head(model, head)) if isinstance(head, nn.Linear) else 0
    except NotImplementedError:
        return 0


def _mlp(layer: nn.Module) -> nn.Module:
    """What stands beside attention in a layer: of its other children the one with the most parameters."""
    children = [child for name, child in layer.named_children() if "attn" not in name and "attention" not in name]
    if not children:
        raise NotImplementedError(
            f"{type(layer).__name__} has nothing beside attention: the planner knows no such layer"
        )
    return max(children, key=lambda child: sum(p.numel() for p in child.parameters()))


def _experts(text: Any) -> tuple[int, int]:
    """Experts that a token sees, and all experts of a layer; 0 of 0 without."""
    seen = getattr(text, "num_experts_per_tok", None) or 0
    every = next(
        (n for key in ("num_experts", "num_local_experts", "n_routed_experts") if (n := getattr(text, key, None))), 0
    )
    return (seen, every) if seen and every else (0, 0)


def _inner(text: Any) -> int:
    """Inner rows of a token in one layer's MLP."""
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    seen, every = _experts(text)
    if not every:
        return int(inner)
    own = getattr(text, "moe_intermediate_size", None) or inner
    shared = getattr(text, "shared_expert_intermediate_size", None) or own * (getattr(text, "n_shared_experts", 0) or 0)
    return int(seen * own + shared)


def _active(layer: nn.Module, text: Any) -> int:
    """Parameters of a layer's matrices that multiply a token."""
    seen, every = _experts(text)
    total = 0
    for name, parameter in layer.named_parameters():
        if parameter.dim() >= 2:
            total += parameter.numel() * seen // every if every and ".experts." in f".{name}." else parameter.numel()
    return total


def layer_masks(text: Any) -> tuple[tuple[Mask, int], ...]:
    """Masks of the attention layers, with the number of each; of layers that carry a state there are none."""
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    kinds = ["full_attention" if kind in BOTH else kind for kind in kinds if kind not in LAYER_TYPES | NEITHER]
    window, chunk = getattr(text, "sliding_window", None), getattr(text, "attention_chunk_size", None)
    known = {
        "full_attention": Mask(),
        "sliding_attention": Mask(window=(window - 1, 0)) if window else Mask(),
        "chunked_attention": Mask(chunk=chunk) if chunk else Mask(),
    }
    if unknown := sorted(set(kinds) - known.keys()):
        raise NotImplementedError(f"{text.model_type} has layers of {', '.join(unknown)}: the planner knows attention")
    if not getattr(text, "layer_types", None) and window and getattr(text, "use_sliding_window", True):
        return ((known["sliding_attention"], len(kinds)),)
    return tuple(Counter(known[kind] for kind in kinds).items())
