"""A transformers model as the planner of memory sees it. The meta device is enough.

Parameters are counted; what a layer computes is taken from the configuration.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from ringattn.hf.head import steps_after_head
from ringattn.hf.heads import heads_of, heads_of_weights, latents_of
from ringattn.hf.layer_parts import attends, mlp_of, parts_of, recurrent_part, rule_of
from ringattn.hf.layers import decoder_layers, mlps_of
from ringattn.hf.recurrent import BOTH, LAYER_TYPES, NEITHER, kind_of
from ringattn.mask import Mask
from ringattn.memory.planning.shapes import ModelShape, Parts, Weights
from ringattn.memory.products import narrow
from ringattn.recurrent.price import RecurrenceShape
from ringattn.recurrent.weighing import MixingLayers

# MLPs that multiply with zero what a token's other experts get, and send nothing.
UNROUTED = ("Llama4TextMoe",)
# Norms that multiply by their weights before they round; the others round first.
WIDE_NORMS = ("Gemma", "VaultGemma", "Olmo2", "Olmo3", "OlmoHybrid", "FlexOlmo", "Qwen3Next", "Qwen3_5", "GptOss")
HEAD_NORMS = ("q_norm.weight", "k_norm.weight", "q_layernorm.weight", "k_layernorm.weight")


def model_shape(model: nn.Module, config: Any, name: str = "") -> ModelShape:
    """The shape of a model with its configuration.

    Raises NotImplementedError for layers that the planner does not know, ValueError if there are none.
    """
    text = config.get_text_config()
    layers = decoder_layers(model)
    kinds = tuple(map(parts_of, layers))
    recurrent = {recurrent_part(layer) for layer, kind in zip(layers, kinds, strict=True) if kind.recurrence}
    if len(recurrent) > 1:
        raise NotImplementedError(f"{text.model_type} has layers with states of several sizes: the planner knows one")
    embedding, head = (getattr(model, f"get_{one}_embeddings")() for one in ("input", "output"))
    tied = head is not None and head.weight is embedding.weight
    inside = {id(p) for layer in layers for p in layer.parameters()}
    inside |= {id(p) for one in (embedding, head) if one is not None for p in one.parameters()}
    largest = _largest_mlp(layers)
    attentions = _attentions(layers)
    attention = next(iter(attentions), nn.Module())
    heads = heads_of_weights(attentions, heads_of(text))
    return ModelShape(
        name=name or text.model_type,
        hidden=text.hidden_size,
        inner=_inner(text, largest, layers),
        query_heads=heads.queries,
        key_heads=heads.keys,
        head_dim=heads.dim,
        vocabulary=text.vocab_size,
        layers=tuple(_weights(layer.parameters()) for layer in layers),
        mlp=_weights(largest.parameters()),
        active=sum(_active(layer, text) for layer in layers) // len(layers),
        embedding=_weights(embedding.parameters()),
        head=Weights(0, 0, 0) if tied or head is None else _weights(head.parameters()),
        rest=_weights(p for p in model.parameters() if id(p) not in inside),
        masks=layer_masks(text),
        gated=any(_gates(name) for name, _ in largest.named_parameters()),
        head_norms=any(name.endswith(HEAD_NORMS) for name, _ in attention.named_parameters()),
        norms_after=all(len(_norms(layer)) == 4 for layer in layers),
        wide_norms=any(norm.startswith(WIDE_NORMS) for norm in _norms(layers[0])),
        logit_steps=_logit_steps(model, head),
        mlp_steps=2 if "relu2" in (getattr(text, name, None) for name in ("mlp_hidden_act", "hidden_act")) else 1,
        kinds=() if set(kinds) == {Parts()} else kinds,
        recurrent=next(iter(recurrent), None),
        gated_attention=_gated_attention(attention, heads.queries * heads.dim),
        tileable=_tileable(model),
        values=heads.value_dim if heads.value_dim != heads.dim else 0,
        latents=latents_of(attention),
        mlp_narrow=_mlp_narrow(largest),
        joined=any({"gate_up_proj", "input_linear"} & set(name.split(".")) for name, _ in largest.named_parameters()),
        routed=_experts(text)[0] if any(map(_has_experts, layers)) else 0,
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


def _weights(parameters: Iterable[nn.Parameter]) -> Weights:
    every = list(parameters)
    return Weights(sum(p.numel() for p in every), sum(p.numel() for p in every if p.requires_grad), len(every))


def _logit_steps(model: nn.Module, head: Any) -> int:
    """Things that a model does to its logits; 0 where that cannot be seen, and no loss is tiled."""
    try:
        return len(steps_after_head(model, head)) if isinstance(head, nn.Linear) else 0
    except NotImplementedError:
        return 0


def _largest_mlp(layers: Iterable[nn.Module]) -> nn.Module:
    """Of all layers. Raises NotImplementedError if there is none."""
    found = [mlp for layer in layers if (mlp := mlp_of(layer)) is not None]
    if not found:
        raise NotImplementedError("no layer has an MLP: the planner knows no such model")
    if unrouted := next((name for mlp in found if (name := type(mlp).__name__) in UNROUTED), None):
        raise NotImplementedError(
            f"{unrouted} computes all experts of every token: the planner knows those it is sent to"
        )
    return max(found, key=lambda mlp: sum(p.numel() for p in mlp.parameters()))


def _attentions(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Of all layers that have one."""
    return [part for layer in layers for name, part in layer.named_children() if attends(name, part)]


def _norms(layer: nn.Module) -> list[str]:
    """Classes of a layer's own norms."""
    return [name for part in layer.children() if (name := type(part).__name__).endswith("Norm")]


def _gated_attention(attention: nn.Module, width: int) -> bool:
    """Whether queries come with a gate for the output, as Qwen3-Next's do."""
    queries = getattr(attention, "q_proj", None)
    return getattr(queries, "out_features", width) == 2 * width


def _mlp_narrow(mlp: nn.Module) -> int:
    """The last product of an MLP is needed for nothing."""
    every = [one for one in mlp.modules() if isinstance(one, nn.Linear)]
    return sum(one.out_features for one in narrow(mlp) if one is not every[-1])


def _gates(name: str) -> bool:
    """Whether a parameter is of one of two products that are multiplied; a router is called gate as well."""
    return any(part in ("w1", "input_linear") or ("gate" in part and part != "gate") for part in name.split("."))


def _tileable(model: nn.Module) -> bool:
    try:
        mlps_of(model)
    except NotImplementedError:
        return False
    return True


def _experts(text: Any) -> tuple[int, int]:
    """Experts that a token sees, and all experts of a layer; 0 of 0 without."""
    seen = getattr(text, "num_experts_per_tok", None) or 0
    every = next(
        (n for key in ("num_experts", "num_local_experts", "n_routed_experts") if (n := getattr(text, key, None))), 0
    )
    return (seen, every) if seen and every else (0, 0)


def _inner(text: Any, mlp: nn.Module, layers: Iterable[nn.Module]) -> int:
    """The most inner rows of a token in one layer's MLP, with shared experts that stand in it or beside it."""
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    seen, every = _experts(text)
    dense = 0 if every and _has_experts(mlp) else _dense_inner(mlp, inner)
    if not every or not any(map(_has_experts, layers)):
        return dense
    own = getattr(text, "moe_intermediate_size", None) or inner
    names = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size")
    shared = next((size for name in names if (size := getattr(text, name, None))), 0)
    shared = shared or own * (getattr(text, "n_shared_experts", 0) or 0)
    return max(dense, int(seen * own + shared))


def _has_experts(part: nn.Module) -> bool:
    return any("experts" in name for name, _ in part.named_modules())


def _dense_inner(mlp: nn.Module, inner: int) -> int:
    """What goes into the last product; configurations have it by several names, and LFM2's is narrower than its own
    says. Where layers hold both products themselves, `mlp` is the first one."""
    if isinstance(mlp, nn.Linear):
        return mlp.out_features
    # Its own alone: adapters have products inside of these.
    products = [one for one in mlp.children() if hasattr(one, "out_features")]
    last = next((one for one in products[::-1] if one.out_features == products[0].in_features), None)
    return int(getattr(last, "in_features", inner))


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
