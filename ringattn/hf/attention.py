"""The function that transformers calls in every attention layer, and what it makes of its keywords.

t tokens of this rank, H query heads, K key heads, D head dim, V value head dim.
"""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ringattn.attention import parallel_attention
from ringattn.hf.cached import DecodeStep
from ringattn.hf.empty import Placeholder, attend_to_none, layout_of
from ringattn.hf.features import without_feature
from ringattn.hf.handle import Handle
from ringattn.hf.masks import MaskNote
from ringattn.mask import Mask
from ringattn.parallel.layout import Layout

# Keywords that reach an attention function without changing the mathematics of a training forward pass. Any other one
# is refused: an unknown keyword may be a feature.
INERT = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "input_ids",
        "labels",
        "layer_idx",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "shift_labels",
        "use_cache",
    }
)
REFUSED = {
    "position_bias": "an additive bias on the scores has no kernel here",
    "attention_bias": "an additive bias on the scores has no kernel here",
    "output_attentions": "flash attention never forms the attention matrix",
    "indices": "keys picked by an index are no band of documents",
    "block_indices": "keys picked by an index are no band of documents",
    "cache": "paged caches are for generation",
}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskNote | Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The AttentionInterface function: (1, H, t, D), (1, K, t, D), (1, K, t, V) -> (1, t, H, V)."""
    handle: Handle | None = getattr(module, "_ringattn", None)
    given = kwargs.pop("cu_seq_lens_q", None)
    layout = layout_of(given)
    if handle is None:
        raise ValueError(
            "ringattn's attention needs parallelize(model, mesh), and this model was not given to it: it shares its "
            'configuration, or the name attn_implementation="ringattn" in it, with one that was. Give each model a '
            "configuration of its own (copy.deepcopy(config))"
        )
    if not isinstance(layout, Layout | DecodeStep):
        raise ValueError(
            "ringattn's attention needs a batch from shard_batch (or the keywords of attention_kwargs(layout)); got "
            f"cu_seq_lens_q={type(layout).__name__}"
        )
    if attention_mask is not None and not isinstance(attention_mask, MaskNote):
        raise ValueError(
            f"attention_mask must be None, got {type(attention_mask).__name__}: documents say who attends to whom"
        )
    if query.shape[0] != 1:
        raise ValueError(f"a packed batch has batch size 1, got {query.shape[0]}: lay the rows end to end as documents")
    if key.shape[2] != query.shape[2]:
        raise NotImplementedError(
            f"{type(module).__name__} attends with {query.shape[2]} queries to {key.shape[2]} keys: KV caches, "
            "prefixes and cross attention are not supported"
        )
    options = _options(module, kwargs, attention_mask)
    if not torch.compiler.is_compiling():
        handle.note(module, options)
    for feature in handle.without.get(getattr(module, "layer_idx", -1), ()):
        options = without_feature(options, feature)
    options["mask"] = _with_blocks(options["mask"], attention_mask, handle, layout)
    if handle.reach is not None:
        options["mask"] = narrowed(options["mask"], handle.reach)
    # Not x[0], whose gradient is copied into zeros for all of x.
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in _one_dtype(module, query, key, value))
    if isinstance(layout, DecodeStep):
        return layout.attend(module, q, k, v, options)[None], None
    if handle.cache is not None:
        tokens = layout.tokens()
        handle.cache.take(module, k[:tokens], v[:tokens])
    if isinstance(given, Placeholder):
        out = parallel_attention(q[:0], k[:0], v[:0], layout, **options, **handle.options)
        return attend_to_none(out)[None], None
    return parallel_attention(q, k, v, layout, **options, **handle.options)[None], None


def _options(module: nn.Module, kwargs: dict[str, Any], note: MaskNote | None) -> dict[str, Any]:
    """transformers' keywords as those of `parallel_attention`. Raises for those that it does not know."""
    for name, reason in REFUSED.items():
        value = kwargs.pop(name, None)
        if value is not None and value is not False:
            raise NotImplementedError(f"{type(module).__name__} asks for {name}: {reason}")
    if kwargs.get("dropout"):
        raise NotImplementedError(
            f"{type(module).__name__} asks for an attention dropout of {kwargs['dropout']}, which has no seed that "
            "ranks share: set it to 0 in the model's configuration (attention_dropout, attn_pdrop)"
        )
    kwargs.pop("dropout", None)
    options = {
        "mask": _mask_of(module, kwargs, note),
        "softmax_scale": kwargs.pop("scaling", None),
        "softcap": kwargs.pop("softcap", None),
        "sinks": kwargs.pop("s_aux", None),
    }
    if unknown := {name for name, value in kwargs.items() if value is not None} - INERT:
        raise TypeError(f"attention got keywords that ringattn does not know: {sorted(unknown)}")
    return options


def _mask_of(module: nn.Module, kwargs: dict[str, Any], note: MaskNote | None) -> Mask:
    """What the keywords and the mask ask for. Raises NotImplementedError if they contradict each other."""
    causal = kwargs.pop("is_causal", None)
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    if note is not None and note.overlay:
        causal = note.mask.causal  # PaliGemma's layers say they are not, as their prefix is not
    size = kwargs.pop("sliding_window", None)
    window = (-1, -1) if size is None else (size - 1, 0 if causal else size - 1)  # the query itself is counted
    if note is None:
        if layer_type(module) == "chunked_attention":
            raise NotImplementedError(f"{type(module).__name__} is chunked, but its model asked for no mask")
        return Mask(causal, window)
    mask = note.mask
    if size is None:
        agree = causal == mask.causal
    else:
        agree = Mask(causal, window).band == mask.band
    if not agree:
        raise NotImplementedError(
            f"{type(module).__name__} contradicts itself: the keywords of its attention say {Mask(causal, window)}, "
            f"the mask that it asked for {mask}"
        )
    return mask


def narrowed(mask: Mask, reach: int) -> Mask:
    """The mask with queries that see at most `reach` tokens back, themselves counted."""
    left, right = mask.window
    return replace(mask, window=(reach - 1 if left < 0 else min(left, reach - 1), right))


def _with_blocks(mask: Mask, note: MaskNote | None, handle: Handle, layout: Layout | DecodeStep) -> Mask:
    """The mask with what this layer does to the blocks of the documents, the same on all ranks.

    A model that makes blocks says so for each layer; to one that does not, those of the documents are the caller's.
    """
    if not isinstance(layout, Layout) or not layout.docs.blocks:
        return replace(mask, blocks="whole") if mask.blocks != "whole" else mask
    if handle.needs.marks and (note is None or not note.overlay):
        return replace(mask, blocks="ignored")
    return mask


def layer_type(module: nn.Module) -> str | None:
    """The entry of the configuration's `layer_types` for an attention layer."""
    layer_types = getattr(getattr(module, "config", None), "layer_types", None)
    index = getattr(module, "layer_idx", None)
    return layer_types[index] if layer_types and isinstance(index, int) and index < len(layer_types) else None


def _one_dtype(module: nn.Module, *qkv: Tensor) -> tuple[Tensor, ...]:
    """Queries and keys that float32 norms left wider than the layer's products (PEFT), in the dtype of those.

    Under autocast `parallel_attention` casts by itself. The order of the sources is that of transformers' own flash
    attention: a quantised model's configuration, then the first linear layer.
    """
    if torch.is_autocast_enabled(qkv[0].device.type) or all(x.dtype != torch.float32 for x in qkv):
        return qkv
    wanted = next(_product_dtypes(module), qkv[2].dtype)
    if all(x.dtype == wanted for x in qkv):
        return qkv
    if not torch.compiler.is_compiling():
        warnings.warn(f"float32 queries, keys or values are cast to {wanted} for attention", stacklevel=2)
    return tuple(x.to(wanted) for x in qkv)


def _product_dtypes(module: nn.Module) -> Iterator[torch.dtype]:
    """In which dtypes the layer multiplies, as its configuration and its linear layers say."""
    config: Any = getattr(module, "config", None)
    if getattr(config, "quantization_config", None) is not None and isinstance(config.dtype, torch.dtype):
        yield config.dtype
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and layer.weight.is_floating_point():
            yield layer.weight.dtype
