"""Layers of transformers that carry a state: which are known, and their forward pass over the ranks of a mesh.

A layer's forward pass runs as it is written, but with other functions under the names by which it mixes tokens: a copy
of the function with the same code and, of its module's names, a few replaced. So nothing outside of the layer changes,
neither the module nor other models, and one replacement serves all families that call the same function.
"""

import inspect
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ringattn.hf.cached import DecodeStep
from ringattn.hf.empty import Placeholder, layout_of
from ringattn.hf.recurrent_functions import ASIDE, MIXING, Batch, lightning_attention
from ringattn.parallel.layout import Layout

_DELTA = ("causal_conv1d_fn", "torch_chunk_gated_delta_rule")
_MAMBA2 = ("causal_conv1d_fn", "mamba2_chunk_scan")
LIGHTNING = "lightning attention"
# Classes that are known, with the functions by which they mix tokens. A test compares each with documents alone.
KNOWN: dict[str, tuple[str, ...]] = {
    "Qwen3NextGatedDeltaNet": _DELTA,
    "Qwen3_5GatedDeltaNet": _DELTA,
    "Qwen3_5MoeGatedDeltaNet": _DELTA,
    "OlmoHybridGatedDeltaNet": _DELTA,
    "KimiLinearDeltaAttention": ("causal_conv1d_fn", "chunk_kimi_delta_attention"),
    "Lfm2ShortConv": ("causal_conv1d_fn",),
    "Lfm2MoeShortConv": ("causal_conv1d_fn",),
    "Mamba2Mixer": _MAMBA2,
    "BambaMixer": _MAMBA2,
    "GraniteMoeHybridMambaLayer": _MAMBA2,
    "FalconH1Mixer": _MAMBA2,
    "NemotronHMamba2Mixer": _MAMBA2,
    "JambaMambaMixer": ("causal_conv1d_fn", "mamba_selective_scan"),
    "MiniMaxLightningAttention": (LIGHTNING,),
}
# Those whose decoder layer keeps its keywords to itself, and hands a mask on.
WITHOUT_KEYWORDS = frozenset({"JambaMambaMixer"})
# Entries of a configuration's `layer_types`: of layers with a state, with both, and with neither.
LAYER_TYPES = frozenset({"linear_attention", "conv"})
BOTH = frozenset({"hybrid"})
NEITHER = frozenset({"mlp", "moe"})
_TOLD = "_ringattn_batch"


@dataclass(frozen=True)
class RecurrentLayers:
    """The layers of a model that carry a state, by path."""

    layers: dict[str, nn.Module]

    def holds(self, path: str) -> bool:
        """Whether a module is one of them, a part of one, or holds one."""
        return any(f"{path}.".startswith(f"{one}.") or f"{one}.".startswith(f"{path}.") for one in self.layers)

    @property
    def calls(self) -> int:
        """Functions that mix tokens and are called in a forward pass."""
        return sum(len(KNOWN[kind_of(layer)]) for layer in self.layers.values())


def kind_of(layer: nn.Module) -> str:
    """The known class that a layer is of, or ""; FSDP gives each module that it shards a class of its own."""
    return next((one.__name__ for one in type(layer).__mro__ if one.__name__ in KNOWN), "")


def recurrent_layers(text: nn.Module) -> RecurrentLayers:
    """The known layers of a model. Raises NotImplementedError for one that is not what it is known as."""
    found = {path: layer for path, layer in text.named_modules() if kind_of(layer)}
    for path, layer in found.items():
        kind = kind_of(layer)
        code = _written(layer).__code__
        expected = {name for name in KNOWN[kind] if name != LIGHTNING}
        mixing = {name for name in code.co_names if name in MIXING}
        if not _written(layer).__module__.startswith("transformers.") or mixing != expected:
            raise NotImplementedError(
                f"{kind} at {path} is not the layer that ringattn knows: it mixes tokens by "
                f"{sorted(mixing) or 'no known function'}, where {sorted(expected)} are expected"
            )
        put_in = vars(layer).get("forward")
        if put_in is not None and getattr(put_in, "__func__", None) is not forward:  # ours: the model is checked again
            raise NotImplementedError(
                f"{kind} at {path} has a forward pass that something else put in (use_kernels, accelerate's hooks): "
                "parallelize the model first, or load it without"
            )
    return RecurrentLayers(found)


def put_in_place(model: Any, text: Any, layers: RecurrentLayers) -> list[Any]:
    """Gives the layers their forward pass over ranks. Returns hooks to remove; `take_back` does the rest.

    To be called when the hooks that fill an empty rank's batch are in place.
    """
    hooks: list[Any] = []
    if layers.layers and text.base_model is not model:
        # Mamba-2 keeps its keywords from its decoder.
        hooks.append(model.register_forward_pre_hook(note_batch, with_kwargs=True))
        hooks.append(text.base_model.register_forward_pre_hook(hand_on, with_kwargs=True))
    for path, layer in layers.layers.items():
        layer.forward = MethodType(forward, layer)
        if kind_of(layer) in WITHOUT_KEYWORDS:
            outer = text.get_submodule(path.rpartition(".")[0])
            hooks.append(outer.register_forward_pre_hook(tell, with_kwargs=True))
    return hooks


def take_back(model: nn.Module) -> None:
    """Gives every layer its own forward pass back."""
    for module in model.modules():
        module.__dict__.pop(_TOLD, None)
        if kind_of(module):
            module.__dict__.pop("forward", None)


def note_batch(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of the whole model."""
    model.__dict__[_TOLD] = kwargs.get("cu_seq_lens_q")


def hand_on(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook of the decoder inside of a model: adds the batch where the model has not handed it on."""
    told = decoder._ringattn.model.__dict__.pop(_TOLD, None)
    return args, kwargs if told is None or kwargs.get("cu_seq_lens_q") is not None else kwargs | {"cu_seq_lens_q": told}


def tell(outer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook of the module around a recurrent layer: the batch stands where the mask would.

    It travels with the call, since layers that are checkpointed run again in the backward pass without their hooks,
    when another batch may have gone through the model.
    """
    if kwargs.get("attention_mask") is not None:
        raise ValueError("attention_mask must be None: give padding and packing as documents, through shard_batch")
    return args, kwargs | {"attention_mask": kwargs.get("cu_seq_lens_q")}


@torch.compiler.disable
def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward pass of a recurrent layer, on the tokens of one rank. Collective.

    It bears this name because a pickled method is found by its name.
    """
    if kind_of(self) in WITHOUT_KEYWORDS:
        kwargs["cu_seq_lens_q"] = kwargs.pop("attention_mask", None)
    batch = _batch(self, kwargs.get("cu_seq_lens_q"))
    if kwargs.get("cache") is not None or self._ringattn.cache is not None:
        raise NotImplementedError(f"{type(self).__name__} cannot keep its state yet: caches are for generation")
    if kwargs.get("attention_mask") is not None:
        raise ValueError("attention_mask must be None: give padding and packing as documents, through shard_batch")
    if KNOWN[kind_of(self)] == (LIGHTNING,):
        return _lightning(self, batch, *args, **kwargs)
    written = _written(self)
    replaced: dict[str, Any] = {}
    for name in set(written.__code__.co_names) & MIXING.keys():
        replaced[name] = partial(_counted, self, name, batch)
    for name in set(written.__code__.co_names) & ASIDE.keys():
        replaced[name] = partial(ASIDE[name], batch)
    # A layout stands where transformers expects numbers; the functions above have it already.
    kwargs = {name: value for name, value in kwargs.items() if not name.startswith(("cu_seq_lens", "max_length"))}
    run = FunctionType(
        written.__code__, {**written.__globals__, **replaced}, written.__name__, written.__defaults__,
        written.__closure__,
    )  # fmt: skip
    run.__kwdefaults__ = written.__kwdefaults__
    return run(self, *args, **kwargs)


def _counted(module: Any, name: str, batch: Batch, *args: Any, **kwargs: Any) -> Any:
    module._ringattn.note_state(module, name)
    return MIXING[name](batch, *args, **kwargs)


def _lightning(self: Any, batch: Batch, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """MiniMax has no function to replace: its forward pass, written again around the recurrence."""
    self._ringattn.note_state(self, LIGHTNING)
    out = self.norm(lightning_attention(batch, self, hidden_states))
    return self.out_proj(F.sigmoid(self.output_gate(hidden_states)) * out), None


def _batch(module: Any, given: Any) -> Batch:
    layout = layout_of(given)
    if isinstance(layout, DecodeStep):
        raise NotImplementedError(
            f"{type(module).__name__} cannot decode from cached keys: its state is not kept after a forward pass"
        )
    if not isinstance(layout, Layout):
        raise ValueError(
            f"{type(module).__name__} needs a batch from shard_batch (or the keywords of attention_kwargs(layout)), "
            f"got cu_seq_lens_q={type(layout).__name__}"
        )
    if module._ringattn.reach is not None:
        raise NotImplementedError(f"{type(module).__name__} has no reach: its state remembers the whole document")
    return Batch(layout, isinstance(given, Placeholder))


def _written(layer: nn.Module) -> Any:
    """The function that a layer's class has for its forward pass, without decorators."""
    return inspect.unwrap(type(layer).forward)
