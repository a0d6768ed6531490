"""The elementwise work of a Hugging Face model as compiled functions: norms, gated MLPs' products, rotary embeddings.

Run one operator at a time, these read and write their tensors several times over: a norm in float32 moves nine times
what it reads. `torch.compile` makes one kernel of each. Whole layers are not compiled: what keeps a layer's attention
(`ringattn.memory.layers`) runs outside of graphs, and so does whatever an engine hooks between a layer's parts. The
functions see any number of tokens, so a batch of another length does not compile again.
"""

from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

_ROTARY = "apply_rotary_pos_emb"


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


def _forward_of(module: Any, compiled: Callable[[Any], Any]) -> Callable[..., Any] | None:
    """What a module's forward method becomes, or None."""
    kind = type(module)
    if kind.__name__.endswith("Norm") and not any(module.children()):
        return MethodType(compiled(kind.forward), module)
    plain = _plain_function(kind.forward)
    if plain is None:
        return None
    if _code(plain) in _GATED and not any(module.act_fn.parameters()):
        return MethodType(_gated(compiled(_product)), module)
    if _ROTARY in plain.__code__.co_names:
        return MethodType(_calling(plain, compiled(plain.__globals__[_ROTARY])), module)
    return None


def _product(act: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """The product of a gated MLP. The activation's hooks, which engines put on every module, are left out."""
    product: Tensor = act.forward(gate) * up
    return product


def _gated(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The forward method of a gated MLP. Its linear layers are not compiled: engines and adapters hook them."""

    def forward(mlp: Any, x: Tensor) -> Tensor:
        out: Tensor = mlp.down_proj(product(mlp.act_fn, mlp.gate_proj(x), mlp.up_proj(x)))
        return out

    return forward


def _code(function: Callable[..., Any]) -> tuple[Any, ...]:
    """What a function does, equal for functions that do the same in the same words."""
    code: CodeType = function.__code__
    return code.co_code, code.co_names, code.co_argcount


def _gated_mlp(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _gated_mlp_in_two_lines(self: Any, x: Tensor) -> Tensor:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj  # noqa: RET504  as transformers writes it


_GATED = {_code(_gated_mlp), _code(_gated_mlp_in_two_lines)}


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
