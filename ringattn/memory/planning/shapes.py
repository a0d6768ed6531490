"""A model and a run in numbers: all that the planner of memory looks at."""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

from ringattn.documents import Documents
from ringattn.mask import Mask
from ringattn.memory.planning.parts import PLAIN_NORM, HeadBytes, Latents, Mlp, NormKind, Parts, RecurrentPart, Weights
from ringattn.parallel.layout import Layout
from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.mesh.shape import MeshShape
from ringattn.parallel.placement.policies import TILE
from ringattn.parallel.plan.shape import Shape
from ringattn.recurrent.weighing import MixingLayers, weighed_layout

ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class ModelShape:
    """A decoder in numbers. `ringattn.hf.shape` reads those of a transformers model.

    Arguments:
        hidden: width of the residual stream.
        head_dim: of queries and keys.
        head_norms: queries and keys have norms of their own.
        norms_after: what attention and MLP give goes through a norm each before it is added, as in Gemma 2.
        norms_before: so does what goes into them; OLMo 2 has no such norm.
        norms: of hidden states.
        logit_steps: things done to logits, one by one, before the loss.
        logits_kept: copies of logits that autograd keeps for these; a factor needs none, a softcap one.
        layers: parameters of each layer, in order.
        parts: what each layer consists of, in order.
        active: parameters of one layer that multiply a token, on the mean: fewer than all with experts.
        embedding, head, rest: parameters of these; a head that is the embedding has none.
        masks: of attention, with the number of layers that each has.
        recurrent: of all layers that have such a part.
        gated_attention: attention's output is multiplied with a gate of its width, which comes with the queries.
        tileable: every layer has an MLP that can be computed in tiles.
        values: dim of a head's values, where it is another than that of its keys; 0: the same.
        latents: of attention with latent keys.
        router_logits: of all layers' routers, for one token, where their loss counts.
        common_keys: the most key heads that divide those of every layer; 0: `key_heads`, which all layers have.
        made: what queries, keys and values are made of, in float32 and in bfloat16; None: of one product each.
        head_products: elements of a token that `keep="selective"` keeps of attention's products; None: those.
    """

    name: str
    hidden: int
    query_heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    layers: tuple[Weights, ...]
    parts: tuple[Parts, ...]
    active: int
    embedding: Weights
    head: Weights
    rest: Weights
    masks: tuple[tuple[Mask, int], ...]
    head_norms: bool = False
    norms_after: bool = False
    norms_before: bool = True
    norms: NormKind = PLAIN_NORM
    logit_steps: int = 0
    logits_kept: int = 0
    recurrent: RecurrentPart | None = None
    gated_attention: bool = False
    tileable: bool = True
    values: int = 0
    latents: Latents | None = None
    common_keys: int = 0
    made: tuple[HeadBytes, HeadBytes] | None = None
    head_products: int | None = None
    router_logits: int = 0

    @property
    def mlps(self) -> tuple[Mlp, ...]:
        """The MLPs of all layers that have one."""
        return tuple(parts.mlp for parts in self.parts if parts.mlp is not None)

    @property
    def mixing(self) -> MixingLayers | None:
        """The layers that layouts weigh, of a model that has some with states."""
        if self.recurrent is None or self.recurrent.rule is None:
            return None
        states = ((self.recurrent.rule, sum(parts.recurrence for parts in self.parts)),)
        return MixingLayers(self.masks, states, (self.query_heads, self.key_heads), self.head_dim)

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
        """Elements of a token's queries."""
        return self.query_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Elements of a token's keys."""
        return self.key_heads * self.head_dim

    @property
    def value_width(self) -> int:
        """Elements of a token's values."""
        return self.key_heads * (self.values or self.head_dim)

    @property
    def out_width(self) -> int:
        """Elements of a token's attention output."""
        return self.query_heads * (self.values or self.head_dim)

    def attention(self, itemsize: int) -> Shape:
        """Heads and dims as plans know them."""
        return Shape(self.query_heads, self.key_heads, self.head_dim, self.values or self.head_dim, itemsize)

    def head_chunks(self, ulysses: int) -> tuple[int, ...]:
        """In how many chunks the heads of a rank can be computed, in ascending order, where so many exchange them: into
        what divides its key heads, if each has as many."""
        own, rest = divmod(self.common_keys or self.key_heads, ulysses)
        if rest or not self.masks:
            return (1,)
        return tuple(count for count in range(1, own + 1) if own % count == 0)

    def with_layers(self, count: int) -> "ModelShape":
        """The same model with so many layers, the first ones, or these over again."""
        layers = tuple(self.layers[number % len(self.layers)] for number in range(count))
        parts = tuple(self.parts[number % len(self.layers)] for number in range(count))
        attending = sum(one.attention for one in parts)
        share = attending / max(1, sum(own for _, own in self.masks))
        masks, left = [], attending
        for number, (mask, own) in enumerate(self.masks):
            taken = left if number == len(self.masks) - 1 else min(left, round(own * share))
            left -= taken
            masks.append((mask, taken))
        return replace(self, layers=layers, parts=parts, masks=tuple((mask, own) for mask, own in masks if own))


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
        recurrent: whose kernels compute recurrences: "fused" (mamba-ssm's and flash-linear-attention's) or "torch".
        matrices: parameters that have Muon's one momentum in the place of AdamW's two moments.
        largest_matrix: rows and columns of the largest matrix among them.
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
    recurrent: str = "fused"
    matrices: int = 0
    largest_matrix: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        for name in ("tokens", "ring", "ulysses", "data", "micro_steps", "head_chunks"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.compute not in ITEMSIZE:
            raise ValueError(f"compute must be one of {', '.join(ITEMSIZE)}, got {self.compute!r}")
        if self.engine not in ("fsdp2", "deepspeed"):
            raise ValueError(f"engine must be fsdp2 or deepspeed, got {self.engine!r}")
        if self.recurrent not in ("fused", "torch"):
            raise ValueError(f"recurrent must be fused or torch, got {self.recurrent!r}")
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


def layout_of(model: ModelShape, run: RunShape, machine: Machine) -> Layout:
    """Where the tokens of a run's pack are, as the recipe lays them out."""
    docs, mesh = Documents(run.documents, total=run.tokens), MeshShape(1, run.ring, run.ulysses, machine=machine)
    if model.mixing is None:
        return Layout(docs, mesh, run.policy, model.masks or None, head_dim=model.head_dim)
    return weighed_layout(docs, mesh, run.policy, model.mixing)
