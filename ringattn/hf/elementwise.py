"""The elementwise work of a Hugging Face model as compiled functions: norms, gated MLPs' products, rotary embeddings.

Run one operator at a time, these read and write their tensors several times over: a norm in float32 moves nine times
what it reads. `torch.compile` makes one kernel of each. Whole layers are not compiled: what keeps a layer's attention
(`ringattn.memory.layers`) runs outside of graphs, and so does whatever an engine hooks between a layer's parts. The
functions see any number of tokens, so a batch of another length does not compile again.
"""

from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

_ROTARY = "apply_rotary_pos_emb"
_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")


class Elementwise:
    """The elementwise parts of a model, compiled; `undo` gives the model back as it was.

    Each stands in its module's place as its forward method, so names of parameters, hooks and types stay. They compile
    when they first run. Do this before tiles are put around an MLP (`ringattn.memory.tiled_rows`), which then call what
    is compiled.

    Arguments:
        model: not inside of torch.compile.
        backend: of torch.compile.

    `parts` names what is compiled, by the module's path. Raises NotImplementedError for a model that has no such part.
    """

    def __init__(self, model: nn.Module, backend: str = "inductor") -> None:
        self._modules: list[nn.Module] = []
        self.parts: tuple[str, ...] = ()
        # Functions are few and modules many: one of each is compiled.
        compiled = cache(lambda function: torch.compile(function, dynamic=True, backend=backend))
        for path, module in model.named_modules():
            if "forward" in module.__dict__:  # somebody else's, which may be no elementwise work at all
                continue
            if (forward := _forward_of(module, compiled)) is not None:
                module.forward = forward
                self._modules.append(module)
                self.parts += (path,)
        if not self.parts:
            raise NotImplementedError(
                f"{type(model).__name__} has no norm, gated MLP or rotary embedding of transformers' kind to compile"
            )

    def undo(self) -> None:
        """The model as it was."""
        for module in self._modules:
            module.__dict__.pop("forward", None)
        self._modules.clear()


def _forward_of(module: nn.Module, compiled: Callable[[Any], Any]) -> Callable[..., Any] | None:
    """What a module's forward method becomes, or None."""
    kind = type(module)
    if kind.__name__.endswith("Norm") and not any(module.children()):
        return MethodType(compiled(kind.forward), module)
    if all(hasattr(module, name) for name in _GATED) and isinstance(module.gate_proj, nn.Linear):
        return _gated_forward(module, compiled)
    plain = _plain_function(kind.forward)
    if plain is None or _ROTARY not in plain.__code__.co_names:
        return None
    return MethodType(_calling(plain, compiled(plain.__globals__[_ROTARY])), module)


def _gated_forward(module: Any, compiled: Callable[[Any], Any]) -> Callable[..., Any] | None:
    """An MLP's forward method with the activation and the product that follows it in one; None for another MLP.

    Its linear layers stay modules that are called: tiles and kept products (`ringattn.memory`) find them there.
    """
    plain, activation = _plain_function(type(module).forward), module.act_fn
    if plain is None or set(plain.__code__.co_names) != set(_GATED) or _has_state(activation):
        return None
    product = compiled(_product_after(_Alike(activation)))

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(product(self.gate_proj(x), self.up_proj(x)))
        return out

    return MethodType(forward, module)


def _has_state(activation: Any) -> bool:
    return isinstance(activation, nn.Module) and any(True for _ in (*activation.parameters(), *activation.buffers()))


class _Alike:
    """An activation function, equal to all that do the same: those of all layers are compiled once."""

    def __init__(self, activation: Any) -> None:
        self.activation = activation
        module = isinstance(activation, nn.Module)
        self._key = (type(activation), repr(activation)) if module else (activation, "")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Alike) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@cache
def _product_after(alike: _Alike) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    activation = alike.activation

    def product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = activation(gate) * up
        return out

    return product


def _plain_function(forward: Any) -> FunctionType | None:
    """A forward method without transformers' decorators for old names of keywords; None if it has any other."""
    for function in _unwrapped(forward):
        if not hasattr(function, "__wrapped__"):
            return function if isinstance(function, FunctionType) else None
        if not function.__code__.co_qualname.startswith("deprecate_kwarg."):
            return None
    return None


def _unwrapped(function: Any) -> Iterator[Any]:
    """A function and what it wraps."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _calling(function: FunctionType, rotary: Callable[..., Any]) -> FunctionType:
    """The function with another rotary embedding: for one model alone, unlike a change of its file's."""
    names = function.__globals__ | {_ROTARY: rotary}
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made
