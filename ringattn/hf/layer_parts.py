"""What the layers of a transformers model consist of, as the planner of memory sees them."""

from typing import Any

from torch import nn

from ringattn.hf.mlp_part import mlp_part
from ringattn.hf.recurrent import KNOWN, LIGHTNING, kind_of
from ringattn.memory.planning.parts import Parts, RecurrentPart
from ringattn.memory.products import narrow
from ringattn.recurrent.price import RecurrenceShape

# The functions by which layers mix tokens.
DELTA, KIMI = "torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention"
MAMBA, MAMBA2, CONVOLUTION = "mamba_selective_scan", "mamba2_chunk_scan", "causal_conv1d_fn"
LAST = ("out_proj", "o_proj")
UNCALLED = ("dt_proj",)  # whose weight alone is used


def recurrent_of(layer: nn.Module) -> Any:
    """The part of a layer that carries a state, or None."""
    return next((part for part in layer.modules() if kind_of(part)), None)


def attends(name: str, part: nn.Module) -> bool:
    """Whether a child of a layer is its attention, and not the norm after it; in Nemotron-H each part has one name."""
    if kind_of(part) or not matrices(part):
        return False
    return "attn" in name or "attention" in name or (name == "mixer" and "Attention" in type(part).__name__)


def matrices(part: nn.Module) -> int:
    """Elements of a part's matrices; a norm has none."""
    return sum(p.numel() for p in part.parameters() if p.dim() >= 2)


def mlp_of(layer: nn.Module) -> nn.Module | None:
    """What looks at one token at a time: of the children that mix no tokens the one with the most matrices."""
    children = [part for name, part in layer.named_children() if not attends(name, part) and recurrent_of(part) is None]
    largest = max(children, key=matrices, default=None)
    return largest if largest is not None and matrices(largest) else None


def norms_of(layer: nn.Module) -> list[nn.Module]:
    """A layer's own, without those inside of its parts."""
    return [part for part in layer.children() if type(part).__name__.endswith("Norm")]


def parts_of(layer: nn.Module, text: Any) -> Parts:
    """By the configuration and the layer. Raises NotImplementedError for one that has no part that is known."""
    attention = any(attends(name, part) for name, part in layer.named_children())
    mlp = mlp_of(layer)
    own = None if mlp is None else mlp_part(mlp, layer, text)
    recurrence = recurrent_of(layer) is not None
    together = attention and not recurrence and own is not None and len(norms_of(layer)) == 1
    parts = Parts(attention, recurrence, own, together)
    if not parts.mixes and parts.mlp is None:
        raise NotImplementedError(f"{type(layer).__name__} has no attention, state or MLP that the planner knows")
    return parts


def rule_of(part: Any) -> RecurrenceShape | None:
    """Heads and dims of a part that carries a state, by its attributes: its weights may be elsewhere. None for a short
    convolution."""
    functions = KNOWN[kind_of(part)]
    if DELTA in functions:
        return RecurrenceShape(part.num_k_heads, part.num_v_heads, part.head_k_dim, part.head_v_dim, True, False)
    if KIMI in functions:
        return RecurrenceShape(part.num_heads, part.num_heads, part.head_dim, part.head_dim, True, True)
    if MAMBA2 in functions:
        return RecurrenceShape(part.n_groups, part.num_heads, part.ssm_state_size, part.head_dim, False, False)
    if MAMBA in functions:  # every channel is a head
        return RecurrenceShape(1, part.intermediate_size, part.ssm_state_size, 1, False, True)
    if LIGHTNING in functions:
        heads = part.num_attention_heads
        return RecurrenceShape(heads, heads, part.head_dim, part.head_dim, False, False)
    return None


def recurrent_part(layer: nn.Module) -> RecurrentPart:
    """Of a layer that has one. Raises NotImplementedError for one whose tensors are not counted."""
    part = recurrent_of(layer)
    kind = kind_of(part)
    before = [name for name, one in part.named_children() if isinstance(one, nn.Linear) and name not in LAST + UNCALLED]
    kept = sum(getattr(part, name).out_features for name in before if getattr(part, name) in narrow(part))
    rule = rule_of(part)
    if rule is None:
        hidden = part.conv.in_channels
        return RecurrentPart(None, hidden, hidden, 3 * hidden, 3 * hidden, kept)
    width = rule.heads * rule.value_dim
    if KNOWN[kind] == (LIGHTNING,):
        return RecurrentPart(rule, 0, width, 3 * width, 3 * width, kept)
    if MAMBA in KNOWN[kind]:
        steps = part.time_step_rank + 2 * rule.key_dim
        return RecurrentPart(rule, width, width, 2 * width + steps, 2 * width, kept)
    if not {DELTA, MAMBA2} & set(KNOWN[kind]):
        raise NotImplementedError(
            f"{kind} is not planned: what the planner counts of layers that carry a state is the gated delta rule, "
            "Mamba-1 and 2, lightning attention and short convolutions"
        )
    channels = 2 * rule.key_heads * rule.key_dim + width
    projected = channels + width + rule.heads * (2 if rule.delta else 1)
    if not rule.delta or "in_proj_qkvz" in before:  # the whole product, of which the gate is a part
        held = projected + (channels if rule.delta else width)
    else:
        held = width
    return RecurrentPart(rule, channels, width, projected, held, kept, getattr(part, "mamba_rms_norm", True))
