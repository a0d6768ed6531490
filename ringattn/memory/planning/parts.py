"""What the layers of a model consist of, in numbers: the parts that the planner of memory knows."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ringattn.recurrent.price import RecurrenceShape

PLAIN = 2  # tensors of inner rows: a product, and its activation
PLAIN_GATE = 4  # tensors of inner rows: two products, the activation of one, and that by the other


@dataclass(frozen=True)
class Weights:
    """How many parameters some modules have, and how many of these are trained."""

    count: int
    trained: int
    tensors: int = 1

    def __add__(self, other: "Weights") -> "Weights":
        return Weights(self.count + other.count, self.trained + other.trained, self.tensors + other.tensors)


@dataclass(frozen=True)
class RecurrentPart:
    """The part of a layer that carries a state, in elements of a token.

    Arguments:
        rule: heads and dims of the recurrence; None for a short convolution and nothing else.
        channels: of the convolution; 0 without one, in lightning attention.
        width: what goes into the product after it.
        projected: all outputs of the products before it.
        held: what the forward pass holds beside the convolution's result and its own, while the recurrence is computed.
        narrow: outputs of its products that `keep="selective"` keeps, the one after it apart.
        normed: a norm comes with the gate after it.
    """

    rule: RecurrenceShape | None
    channels: int
    width: int
    projected: int
    held: int
    narrow: int
    normed: bool = True

    @property
    def package(self) -> str | None:
        """Whose kernel computes the recurrence on GPUs, "fla" or "mamba"; None for Mamba-1, which no package has here,
        and without a recurrence."""
        if self.rule is None or (self.rule.diagonal and not self.rule.delta):
            return None
        return "fla" if self.rule.delta or not self.channels else "mamba"


@dataclass(frozen=True)
class NormKind:
    """How norms of hidden states are computed; as they stand, as Llama's.

    Arguments:
        kernel: one kernel each, as torch's LayerNorm, which keeps its input as it is.
        wide: they multiply by their weights in float32, as those of Gemma and OLMo 2 do.
        centred: they subtract a mean by operators of their own, as Cohere's do, and keep what is left twice in the
            place of their input.
    """

    kernel: bool = False
    wide: bool = False
    centred: bool = False


PLAIN_NORM = NormKind()


class HeadBytes(NamedTuple):
    """What attention holds between the layer's input and its kernel, in bytes of a token, elementwise work by itself.

    Arguments:
        forward: the most until the kernel is called, where nothing is kept.
        beside: what is there then beside queries, keys and values as the kernel takes them.
        after: what is there when it is over, beside its result; copies that were made for it have gone.
        kept: beside these, by autograd.
        products: of that what matrix products gave.
        backward: the most on the way back, of what was kept and of gradients.
    """

    forward: float
    beside: float
    after: float
    kept: float = 0.0
    products: float = 0.0
    backward: float = 0.0

    @classmethod
    def most(cls, found: Iterable["HeadBytes"]) -> "HeadBytes":
        """Of several each number's largest."""
        return cls(*map(max, zip(*found, strict=True)))


@dataclass(frozen=True)
class Latents:
    """What queries, keys and values are made of where keys are latent, as DeepSeek-V2's, in elements of a token.

    Arguments:
        queries: of the latent of all queries; 0: they are one product of the layer's input.
        keys: of that of all keys and values.
        rotary: of the part of a head that is turned by its position, which the keys of all heads have together.
        turned: that part is turned indeed, and joined with the rest of the queries; Kimi Linear's is not.
        narrow: outputs of its products that `keep="selective"` keeps, the one after attention apart.
    """

    queries: int
    keys: int
    rotary: int
    turned: bool
    narrow: int


@dataclass(frozen=True)
class Mlp:
    """The part of a layer that looks at one token at a time, in elements of a token.

    Arguments:
        weights: its parameters, of all experts.
        inner: rows that a token has: of all experts that see it, and of those that every token goes through.
        gated: it multiplies two products, as SwiGLU does.
        joined: both of these are one product, of which both halves stay as long as either.
        steps: operators of the activation, each of which gives all inner rows.
        narrow: outputs of its products that `keep="selective"` keeps, the last one apart.
        routed: experts that a token is copied for; 0: it has none.
        kept: tensors of all inner rows that autograd keeps: a gated product's factors and itself, the activation, and
            what else a gate of its own kind makes of these, such as factors that are clamped.
        back: the most of these, and of their gradients, on the way back of an MLP without a gate.
        biased: experts have biases, which are copied for each token.
        shared: of the inner rows those of experts that every token goes through, whose result may wait for the others'.
        shared_gate: that is multiplied by a gate, for which it is kept.
        wide_router: autograd keeps a router's input in float32.
        wide_weights: what experts give is multiplied by weights in float32, and is float32 from there on.
    """

    weights: Weights
    inner: int
    gated: bool = True
    joined: bool = False
    steps: int = 1
    narrow: int = 0
    routed: int = 0
    kept: int = PLAIN_GATE
    back: int = PLAIN + 1
    biased: bool = False
    shared: int = 0
    shared_gate: bool = False
    wide_router: bool = False
    wide_weights: bool = False

    @property
    def products(self) -> int:
        """Matrix products of a row."""
        return 3 if self.gated else 2


@dataclass(frozen=True)
class Parts:
    """What a layer consists of, with a norm before each: attention and a recurrence beside it have one together.

    Arguments:
        together: attention and MLP have one norm, and their results are added at once, as in Cohere and Phi.
    """

    attention: bool = True
    recurrence: bool = False
    mlp: Mlp | None = None
    together: bool = False

    @property
    def mixes(self) -> bool:
        """Whether the layer looks at more than one token."""
        return self.attention or self.recurrence
