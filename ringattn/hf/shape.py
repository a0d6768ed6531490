"""A transformers model as the planner of memory sees it. The meta device is enough.

Parameters are counted; what a layer computes is taken from the configuration.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ringattn.hf.configuration import asks_router_loss
from ringattn.hf.head import steps_after_head
from ringattn.hf.head_probe import head_bytes
from ringattn.hf.heads import common_key_heads, heads_of, heads_of_weights, latents_of
from ringattn.hf.held_storages import kept_tensors
from ringattn.hf.layer_parts import LAST, attends, matrices, norms_of, parts_of, recurrent_part, rule_of
from ringattn.hf.layers import decoder_layers, tileable_mlps
from ringattn.hf.mlp_part import experts_of, weights_of
from ringattn.hf.norm_probe import norm_kind
from ringattn.hf.recurrent import BOTH, LAYER_TYPES, NEITHER, kind_of
from ringattn.mask import Mask
from ringattn.memory.planning.parts import Parts, Weights
from ringattn.memory.planning.shapes import ModelShape
from ringattn.memory.products import narrow
from ringattn.recurrent.price import RecurrenceShape
from ringattn.recurrent.weighing import MixingLayers

HEAD_NORMS = tuple(f"{one}norm.weight" for one in ("q_", "k_", "q_layer", "k_layer", "query_layer", "key_layer"))


def model_shape(model: nn.Module, config: Any, name: str = "") -> ModelShape:
    """The shape of a model with its configuration.

    Raises NotImplementedError for layers that the planner does not know, ValueError if there are none.
    """
    text = config.get_text_config()
    layers = decoder_layers(model)
    parts = tuple(parts_of(layer, text) for layer in layers)
    if not any(one.mlp for one in parts):
        raise NotImplementedError("no layer has an MLP: the planner knows no such model")
    recurrent = {recurrent_part(layer) for layer, one in zip(layers, parts, strict=True) if one.recurrence}
    if len(recurrent) > 1:
        raise NotImplementedError(f"{text.model_type} has layers with states of several sizes: the planner knows one")
    embedding, head = (getattr(model, f"get_{one}_embeddings")() for one in ("input", "output"))
    tied = head is not None and head.weight is embedding.weight
    inside = {id(p) for layer in layers for p in layer.parameters()}
    inside |= {id(p) for one in (embedding, head) if one is not None for p in one.parameters()}
    attentions = _attentions(layers)
    attention = next(iter(attentions), nn.Module())
    heads = heads_of_weights(attentions, heads_of(text))
    steps = _logit_steps(model, head)
    without = all(map(_norms_after_alone, layers))
    return ModelShape(
        name=name or text.model_type,
        hidden=text.hidden_size,
        query_heads=heads.queries,
        key_heads=heads.keys,
        head_dim=heads.dim,
        vocabulary=text.vocab_size,
        layers=tuple(weights_of(layer.parameters()) for layer in layers),
        parts=parts,
        active=sum(_active(layer, text) for layer in layers) // len(layers),
        embedding=weights_of(embedding.parameters()),
        head=Weights(0, 0, 0) if tied or head is None else weights_of(head.parameters()),
        rest=weights_of(p for p in model.parameters() if id(p) not in inside),
        masks=layer_masks(text),
        head_norms=any(name.endswith(HEAD_NORMS) for name, _ in attention.named_parameters()),
        norms_after=all(len(norms_of(layer)) == 4 for layer in layers) or without,
        norms_before=not without,
        norms=norm_kind(next(iter(norms_of(layers[0])), None), text.hidden_size),
        logit_steps=len(steps),
        logits_kept=_kept_by(steps),
        recurrent=next(iter(recurrent), None),
        gated_attention=_gated_attention(attention, heads.queries * heads.dim),
        tileable=_tileable(model),
        values=heads.value_dim if heads.value_dim != heads.dim else 0,
        latents=latents_of(attention),
        common_keys=common_key_heads(attentions, heads),
        made=head_bytes(model, attentions) if attentions and latents_of(attention) is None else None,
        head_products=_narrow_products(attention),
        router_logits=_router_logits(model, parts, text),
    )


def mixing_layers(model: nn.Module) -> MixingLayers:
    """The attention layers and those with a state of a model, for `shard_batch(layers=...)`.

    Short convolutions are not among them: they cost the same wherever tokens are. Raises ValueError for a model that
    has no layer of either kind.
    """
    config: Any = model.config
    text = config.get_text_config()
    rules = (rule_of(part) for part in model.modules() if kind_of(part))
    states = tuple(Counter[RecurrenceShape](rule for rule in rules if rule is not None).items())
    masks = layer_masks(text)
    if not masks:  # then configurations may lack heads
        return MixingLayers(states=states)
    heads = heads_of(text)
    return MixingLayers(masks, states, heads[:2], heads.dim)


def weighed_layers(model: nn.Module) -> MixingLayers | None:
    """`mixing_layers` of a model with layers that carry a state; None for others, whose attention alone is weighed."""
    states = any(rule_of(part) is not None for part in model.modules() if kind_of(part))
    return mixing_layers(model) if states else None


def _logit_steps(model: nn.Module, head: Any) -> tuple[Any, ...]:
    """Things that a model does to its logits; none where that cannot be seen, and no loss is tiled."""
    try:
        return steps_after_head(model, head) if isinstance(head, nn.Linear) else ()
    except NotImplementedError:
        return ()


def _kept_by(steps: tuple[Any, ...]) -> int:
    """Copies of logits that autograd keeps for these."""
    logits = torch.empty(64, 64, device="meta", requires_grad=True) * 1
    with kept_tensors() as kept:
        for step in steps:
            logits = step.on(logits)
    return len({x.untyped_storage()._cdata for x in kept if x.numel() == logits.numel()})


def _attentions(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Of all layers that have one."""
    return [part for layer in layers for name, part in layer.named_children() if attends(name, part)]


def _norms_after_alone(layer: nn.Module) -> bool:
    """Whether what attention and MLP give goes through a norm, and what goes into them through none."""
    return len(norms_of(layer)) == 2 and hasattr(layer, "post_feedforward_layernorm")


def _gated_attention(attention: nn.Module, width: int) -> bool:
    """Whether queries come with a gate for the output, as Qwen3-Next's do."""
    queries = getattr(attention, "q_proj", None)
    return getattr(queries, "out_features", width) == 2 * width


def _narrow_products(attention: nn.Module) -> int:
    """Outputs of its products that `keep="selective"` keeps, the one after attention apart: adapters of it too."""
    own = {name: narrow(part) for name, part in attention.named_children() if matrices(part)}
    last = next((name for name in LAST if name in own), next(reversed(own), ""))
    return sum(one.out_features for name, products in own.items() if name != last for one in products)


def _tileable(model: nn.Module) -> bool:
    try:
        tileable_mlps(model)
    except NotImplementedError:
        return False
    return True


def _router_logits(model: nn.Module, parts: tuple[Parts, ...], text: Any) -> int:
    """Of all layers with experts, for one token, where a model adds the loss of its routers."""
    mixtures = sum(part.mlp is not None and part.mlp.routed > 0 for part in parts)
    return mixtures * experts_of(text)[1] if asks_router_loss(model) else 0


def _active(layer: nn.Module, text: Any) -> int:
    """Parameters of a layer's matrices that multiply a token."""
    seen, every = experts_of(text)
    total = 0
    for name, parameter in layer.named_parameters():
        if parameter.dim() >= 2:
            total += parameter.numel() * seen // every if every and ".experts." in f".{name}." else parameter.numel()
    return total


def layer_masks(text: Any) -> tuple[tuple[Mask, int], ...]:
    """Masks of the attention layers, with the number of each; of layers that carry a state there are none."""
    return tuple(Counter(mask for mask in masks_by_layer(text) if mask is not None).items())


def masks_by_layer(text: Any) -> tuple[Mask | None, ...]:
    """The mask of each layer, None for one without attention."""
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    kinds = ["full_attention" if kind in BOTH else kind for kind in kinds]
    window, chunk = getattr(text, "sliding_window", None), getattr(text, "attention_chunk_size", None)
    known = {
        "full_attention": Mask(),
        "sliding_attention": Mask(window=(window - 1, 0)) if window else Mask(),
        "chunked_attention": Mask(chunk=chunk) if chunk else Mask(),
    }
    without = LAYER_TYPES | NEITHER
    if unknown := sorted(set(kinds) - known.keys() - without):
        raise NotImplementedError(f"{text.model_type} has layers of {', '.join(unknown)}: the planner knows attention")
    if not getattr(text, "layer_types", None) and window and getattr(text, "use_sliding_window", True):
        return (known["sliding_attention"],) * len(kinds)
    return tuple(None if kind in without else known[kind] for kind in kinds)
