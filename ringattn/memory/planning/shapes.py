"""A model and a run in numbers: all that the planner of memory looks at."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import nn

from ringattn.mask import Mask
from ringattn.parallel.placement.policies import TILE
from ringattn.parallel.plan.shape import Shape

ITEMSIZE = {"float32": 4, "bfloat16": 2}
_STEPS_OF_CAP = 3  # of logits that are softcapped: divided, tanh, multiplied


@dataclass(frozen=True)
class Weights:
    """How many parameters some modules have, and how many of these are trained."""

    count: int
    trained: int
    tensors: int = 1

    @classmethod
    def of(cls, parameters: Sequence[nn.Parameter]) -> "Weights":
        """Those of some parameters."""
        trained = sum(one.numel() for one in parameters if one.requires_grad)
        return cls(sum(one.numel() for one in parameters), trained, len(parameters))

    def __add__(self, other: "Weights") -> "Weights":
        return Weights(self.count + other.count, self.trained + other.trained, self.tensors + other.tensors)


@dataclass(frozen=True)
class ModelShape:
    """A decoder in numbers. Parameters are counted; what a layer computes is taken from the configuration.

    Arguments:
        hidden: width of the residual stream.
        inner: rows of the MLP that a token has: of all experts that see it.
        gated: the MLP multiplies two products, as SwiGLU does.
        head_norms: queries and keys have norms of their own.
        logit_steps: things done to logits, one by one, before the loss.
        layers: parameters of each layer, in order.
        mlp: parameters of one layer's MLP, of all experts.
        active: parameters of one layer that multiply a token, which are fewer than all with experts.
        embedding, head, rest: parameters of these; a head that is the embedding has none.
        masks: of attention, with the number of layers that each has.
    """

    name: str
    hidden: int
    inner: int
    query_heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    layers: tuple[Weights, ...]
    mlp: Weights
    active: int
    embedding: Weights
    head: Weights
    rest: Weights
    masks: tuple[tuple[Mask, int], ...]
    gated: bool = True
    head_norms: bool = False
    logit_steps: int = 0

    @classmethod
    def of(cls, model: nn.Module, config: Any, name: str = "") -> "ModelShape":
        """Of a transformers model, which may be on the meta device, with its configuration.

        Raises NotImplementedError for layers that are not attention and an MLP.
        """
        text = config.get_text_config()
        layers = _layers(model, text.num_hidden_layers)
        embedding, head = (getattr(model, f"get_{one}_embeddings")() for one in ("input", "output"))
        tied = head is not None and head.weight is embedding.weight
        inside = {id(p) for layer in layers for p in layer.parameters()}
        inside |= {id(p) for one in (embedding, head) if one is not None for p in one.parameters()}
        mlps = [_mlp(layer) for layer in layers]
        largest = max(mlps, key=lambda mlp: sum(p.numel() for p in mlp.parameters()))
        heads = text.num_attention_heads
        return cls(
            name=name or text.model_type,
            hidden=text.hidden_size,
            inner=_inner(text),
            query_heads=heads,
            key_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            vocabulary=text.vocab_size,
            layers=tuple(Weights.of(list(layer.parameters())) for layer in layers),
            mlp=Weights.of(list(largest.parameters())),
            active=sum(_active(layer, text) for layer in layers) // len(layers),
            embedding=Weights.of(list(embedding.parameters())),
            head=Weights(0, 0, 0) if tied or head is None else Weights.of(list(head.parameters())),
            rest=Weights.of([p for p in model.parameters() if id(p) not in inside]),
            masks=_masks(text),
            gated=any("gate" in name or "w1" in name for name, _ in largest.named_parameters()),
            head_norms=any(
                name.endswith(("q_norm.weight", "k_norm.weight")) for name, _ in layers[0].named_parameters()
            ),
            logit_steps=_logit_steps(text),
        )

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.head.count == 0

    @cached_property
    def largest_layer(self) -> Weights:
        """The layer with the most parameters."""
        return max(self.layers, key=lambda layer: layer.count)

    @cached_property
    def total(self) -> Weights:
        """All parameters."""
        return sum(self.layers, self.embedding + self.head + self.rest)

    @property
    def backward(self) -> float:
        """Matrix products of the backward pass, in those of the forward pass: frozen weights have no gradient."""
        return 1.0 + self.total.trained / self.total.count

    @property
    def query_width(self) -> int:
        """Elements of a token's queries, and of its attention output."""
        return self.query_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Elements of a token's keys, and of its values."""
        return self.key_heads * self.head_dim

    def attention(self, itemsize: int) -> Shape:
        """Heads and dims as plans know them."""
        return Shape(self.query_heads, self.key_heads, self.head_dim, self.head_dim, itemsize)

    def with_layers(self, count: int) -> "ModelShape":
        """The same model with so many layers, the first ones, or these over again."""
        layers = tuple(self.layers[number % len(self.layers)] for number in range(count))
        share = count / len(self.layers)
        masks, left = [], count
        for number, (mask, own) in enumerate(self.masks):
            taken = left if number == len(self.masks) - 1 else min(left, round(own * share))
            left -= taken
            masks.append((mask, taken))
        return replace(self, layers=layers, masks=tuple((mask, own) for mask, own in masks if own))


@dataclass(frozen=True)
class RunShape:
    """How a model is trained, in numbers.

    Arguments:
        tokens: of the longest pack.
        ring, ulysses: ranks that share a pack.
        data: groups of them, each with packs of its own.
        lengths: of the documents of a pack; default: one, which is the dearest.
        compute: dtype of products and of what is kept.
        engine: "fsdp2" or "deepspeed".
        zero_stage: of DeepSpeed.
        micro_steps: packs of a rank in a step.
        policy: of the layout.
        head_chunks: see `parallel_attention`.
        kernel_sums: attention's backward kernel adds up in float32 memory of its own, as all on GPUs do.
        fused: norms, rotary embeddings and the MLP's product are one kernel each (`ringattn.hf.elementwise`).
    """

    tokens: int
    ring: int = 1
    ulysses: int = 1
    data: int = 1
    lengths: tuple[int, ...] = field(default=())
    compute: str = "bfloat16"
    engine: str = "fsdp2"
    zero_stage: int = 3
    micro_steps: int = 1
    policy: str = "auto"
    head_chunks: int = 1
    kernel_sums: bool = True
    fused: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "ring", "ulysses", "data", "micro_steps", "head_chunks"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.compute not in ITEMSIZE:
            raise ValueError(f"compute must be one of {', '.join(ITEMSIZE)}, got {self.compute!r}")
        if self.engine not in ("fsdp2", "deepspeed"):
            raise ValueError(f"engine must be fsdp2 or deepspeed, got {self.engine!r}")
        if self.zero_stage not in (1, 2, 3):
            raise ValueError(f"zero_stage must be 1, 2 or 3, got {self.zero_stage!r}")
        if self.lengths and (min(self.lengths) < 0 or sum(self.lengths) > self.tokens):
            raise ValueError(
                f"lengths must be documents of a pack of tokens={self.tokens}, got {sum(self.lengths)} tokens in them"
            )

    @property
    def itemsize(self) -> int:
        """Bytes of an element of what is computed."""
        return ITEMSIZE[self.compute]

    @property
    def ranks(self) -> int:
        """All ranks, over which states are sharded."""
        return self.data * self.ring * self.ulysses

    @property
    def documents(self) -> tuple[int, ...]:
        """Lengths of the documents of a pack."""
        return self.lengths or (self.tokens,)

    @property
    def local_tokens(self) -> int:
        """The most tokens that a rank holds.

        A balanced position is off its share by what the cut at either end is rounded by, half a tile each; a zigzag by
        a row or two of each document; runs of the stream by none. A position deals its rows evenly to ulysses ranks.
        """
        position = math.ceil(self.tokens / self.ring)
        if self.ring > 1:
            rounding = 2 * len(self.documents) if self.policy == "zigzag" else TILE * (self.policy != "contiguous")
            position = min(self.tokens, position + rounding)
        return math.ceil(position / self.ulysses)


def _layers(model: nn.Module, wanted: int) -> nn.ModuleList:
    """The repeated layers. Raises ValueError if they cannot be found."""
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == wanted]
    if not found:
        raise ValueError(f"{type(model).__name__} has no list of {wanted} decoder layers")
    return max(found, key=lambda layers: sum(p.numel() for p in layers.parameters()))


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


def _masks(text: Any) -> tuple[tuple[Mask, int], ...]:
    """Masks of the attention layers, with the number of each."""
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
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


def _logit_steps(text: Any) -> int:
    """Things that a model does to its logits."""
    capped = getattr(text, "final_logit_softcapping", None)
    scaled = next((x for key in ("logit_scale", "logits_scaling") if (x := getattr(text, key, None))), None)
    return _STEPS_OF_CAP * bool(capped) + (scaled not in (None, 1, 1.0))
