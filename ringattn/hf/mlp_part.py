"""The MLP or mixture of experts of one layer, as the planner of memory sees it."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ringattn.hf.expert_probe import held_by_gradients, kept_by_activation, kept_by_gate, router_dtypes
from ringattn.memory.planning.parts import PLAIN, Mlp, Weights
from ringattn.memory.products import narrow

# MLPs that multiply with zero what a token's other experts get, and send nothing.
UNROUTED = ("Llama4TextMoe",)
# How transformers computes experts: in one grouped product for all, whose tensors are counted, or one after another,
# which holds about as much if all is kept and less otherwise. Others copy weights for each token, or are kernels.
COUNTED = (None, "eager", "grouped_mm")


def mlp_part(mlp: nn.Module, layer: nn.Module, text: Any) -> Mlp:
    """Of a layer that has one.

    Arguments:
        mlp: of the layer's children the one that looks at one token at a time; others may stand beside it.
        text: the configuration.

    Raises NotImplementedError for one whose tensors are not counted.
    """
    if (name := type(mlp).__name__) in UNROUTED:
        raise NotImplementedError(f"{name} computes all experts of every token: the planner knows those it is sent to")
    names = [name for name, _ in mlp.named_parameters()]
    experts = next((one for one in mlp.modules() if hasattr(one, "has_gate")), None)
    way = getattr(text, "_experts_implementation", None)
    if experts is not None and way not in COUNTED:
        raise NotImplementedError(
            f"experts_implementation={way!r} is not planned: what the planner counts is grouped_mm"
        )
    copies, weights = (False, False) if experts is None else router_dtypes(mlp, experts)
    gated = any(map(_gates, names))
    kept = kept_by_gate(experts) if gated else kept_by_activation(_activation(mlp, layer))
    steps = 2 if "relu2" in (getattr(text, name, None) for name in ("mlp_hidden_act", "hidden_act")) else 1
    return Mlp(
        weights=weights_of(mlp.parameters()),
        inner=_inner(text, mlp, layer),
        gated=gated,
        joined=any({"gate_up_proj", "input_linear"} & set(name.split(".")) for name in names),
        steps=steps if gated else max(steps, kept - 1),
        narrow=_narrow(mlp),
        routed=experts_of(text)[0] if _has_experts(layer) else 0,
        kept=kept,
        back=PLAIN + 1 if gated else held_by_gradients(_activation(mlp, layer)),
        biased=getattr(experts, "has_bias", False),
        shared=_shared(layer, text) if _has_experts(layer) else 0,
        shared_gate="shared_expert_gate.weight" in names,
        wide_router=copies,
        wide_weights=weights,
    )


def weights_of(parameters: Iterable[nn.Parameter]) -> Weights:
    """How many they are."""
    every = list(parameters)
    return Weights(sum(p.numel() for p in every), sum(p.numel() for p in every if p.requires_grad), len(every))


def experts_of(text: Any) -> tuple[int, int]:
    """Experts that a token sees, and all experts of a layer; 0 of 0 without."""
    seen = _seen(text)
    every = next(
        (n for key in ("num_experts", "num_local_experts", "n_routed_experts") if (n := getattr(text, key, None))), 0
    )
    return (seen, every) if seen and every else (0, 0)


def _seen(text: Any) -> int:
    """HunYuan's may be a list, of one number a layer; the most is taken."""
    seen = next((n for key in ("num_experts_per_tok", "moe_topk") if (n := getattr(text, key, None))), 0)
    return max(seen) if isinstance(seen, list) else seen


def _inner(text: Any, mlp: nn.Module, layer: nn.Module) -> int:
    """Inner rows of a token, with shared experts that stand in the MLP or beside it."""
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    seen, every = experts_of(text)
    dense = 0 if every and _has_experts(mlp) else _dense_inner(mlp, inner)
    if not every or not _has_experts(layer):
        return dense
    own = getattr(text, "moe_intermediate_size", None) or inner
    return max(dense, seen * own + _shared(layer, text))


def _shared(layer: nn.Module, text: Any) -> int:
    """Inner rows of experts that every token goes through. Their widths have many names in configurations."""
    found = [part for name, part in layer.named_modules() if "shared" in name.rpartition(".")[2]]
    mlps = [part for part in found if any(hasattr(one, "out_features") for one in part.children())]
    return sum(_dense_inner(one, getattr(text, "intermediate_size", None) or 4 * text.hidden_size) for one in mlps)


def _activation(mlp: nn.Module, layer: nn.Module) -> nn.Module | None:
    """Of an MLP, or of the layer that holds both products itself."""
    for owner in (*mlp.modules(), layer):
        for name in ("act_fn", "act", "activation_fn", "activation"):
            if isinstance(found := getattr(owner, name, None), nn.Module):
                return found
    return None


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


def _gates(name: str) -> bool:
    """Whether a parameter is of one of two products that are multiplied; a router is called gate as well."""
    return any(part in ("w1", "input_linear") or ("gate" in part and part != "gate") for part in name.split("."))


def _narrow(mlp: nn.Module) -> int:
    """The last product of an MLP is needed for nothing."""
    every = [one for one in mlp.modules() if isinstance(one, nn.Linear)]
    return sum(one.out_features for one in narrow(mlp) if one is not every[-1])
