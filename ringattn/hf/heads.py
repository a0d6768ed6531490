"""Heads of attention: how many there are, their dims, and what latents they are made of.

A configuration says the dims, and not every `head_dim` is that of a head: in families with latent keys it is the part
that is turned by positions. What is read is compared with the weights, so that what is not known is refused.
"""

import inspect
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from ringattn.hf.layer_parts import LAST
from ringattn.memory.planning.parts import Latents
from ringattn.memory.products import narrow

# What attention with latent keys consists of.
LATENT = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


class Heads(NamedTuple):
    """Of one layer's attention; `dim` is that of queries and keys."""

    queries: int
    keys: int
    dim: int
    value_dim: int


def heads_of(text: Any) -> Heads:
    """Of all layers of a text configuration. Raises NotImplementedError if they differ from layer to layer."""
    if not getattr(text, "is_heterogeneous", False):
        return _heads(text)
    found = set(heads_by_layer(text))
    if len(found) > 1:
        dims = ", ".join(str(dim) for dim in sorted({heads.dim for heads in found}))
        raise NotImplementedError(f"{text.model_type} has heads of dims {dims}, layer by layer: the planner knows one")
    return found.pop()


def heads_by_layer(text: Any) -> tuple[Heads, ...]:
    """Of each layer."""
    if not getattr(text, "is_heterogeneous", False):
        return (_heads(text),) * text.num_hidden_layers
    return tuple(_heads(text.per_layer_config[layer]) for layer in range(text.num_hidden_layers))


def _heads(text: Any) -> Heads:
    queries = text.num_attention_heads
    if getattr(text, "kv_lora_rank", None) and getattr(text, "qk_nope_head_dim", None):
        # Keys are made for every query head, whatever number of theirs the configuration has.
        return Heads(queries, queries, text.qk_nope_head_dim + text.qk_rope_head_dim, text.v_head_dim)
    keys = getattr(text, "num_key_value_heads", None) or queries
    dim = getattr(text, "head_dim", None) or text.hidden_size // queries
    return Heads(queries, keys, dim, getattr(text, "v_head_dim", None) or dim)


def heads_of_weights(attentions: Iterable[nn.Module], heads: Heads) -> Heads:
    """The heads of a model's attention by its configuration, with the most key heads that any layer has.

    Raises NotImplementedError if the weights are of other heads.
    """
    most = heads.keys
    for attention in attentions:
        keys = _width(attention, "k_proj", heads.keys * heads.dim) // heads.dim
        most = max(most, keys)
        queries, out = heads.queries * heads.dim, heads.queries * heads.value_dim
        last = next((name for name in LAST if hasattr(attention, name)), "")
        widths = (
            ("queries", _width(attention, "q_proj", queries), (queries, 2 * queries)),  # twice with a gate
            ("keys", _width(attention, "k_proj", keys * heads.dim), (keys * heads.dim,)),
            ("values", _width(attention, "v_proj", keys * heads.value_dim), (keys * heads.value_dim,)),
            ("outputs", _width(attention, last, out, "in_features"), (out,)),
        )
        for name, size, known in widths:
            if size not in known:
                raise NotImplementedError(
                    f"{type(attention).__name__} has {name} of {size} elements, where {heads.queries} heads of its "
                    f"configuration make {known[0]}: the planner knows models whose layers have the same heads"
                )
    return heads._replace(keys=most)


def common_key_heads(attentions: Iterable[nn.Module], heads: Heads) -> int:
    """The most key heads that divide those of every attention."""
    widths = (_width(one, "k_proj", heads.keys * heads.dim) for one in attentions)
    return math.gcd(*(width // heads.dim for width in widths))


def _width(attention: nn.Module, name: str, default: int, side: str = "out_features") -> int:
    """Of one of its products; default: where it has none of that name."""
    return int(getattr(getattr(attention, name, None), side, default))


def latents_of(attention: Any) -> Latents | None:
    """What queries, keys and values of an attention are made of, None if not of latents. Raises NotImplementedError
    for one with parts that the planner does not know."""
    if not hasattr(attention, "kv_b_proj"):
        return None
    products = {name for name, part in attention.named_children() if hasattr(part, "out_features")}
    if unknown := sorted(products - set(LATENT)) or "kv_a_proj_with_mqa" not in products:
        told = f"with {', '.join(unknown)}" if isinstance(unknown, list) else "without kv_a_proj_with_mqa"
        raise NotImplementedError(
            f"{type(attention).__name__} has latent keys {told}: the planner knows those of DeepSeek-V2"
        )
    keys = attention.kv_b_proj.in_features
    queries = getattr(attention, "q_a_proj", None)
    kept = [one.out_features for one in narrow(attention) if one is not attention.o_proj]
    return Latents(
        queries=0 if queries is None else queries.out_features,
        keys=keys,
        rotary=attention.kv_a_proj_with_mqa.out_features - keys,
        turned="position_embeddings" in inspect.signature(attention.forward).parameters,
        narrow=sum(kept),
    )
