"""Tensors that stand for a model's logits, which are not there: they notice what is done to them, or have it behind
them, and let nothing else be done."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

# What may be done to logits: these, with numbers as other arguments, ...
_ELEMENTWISE = {"div", "mul", "add", "sub", "tanh", "neg"}
# ... and what leaves values as they are, since tiles of logits are in float32 anyway.
_CASTS = {"to", "float", "contiguous", "clone", "type", "half", "bfloat16"}
# What engines and output classes ask of a tensor without looking at its values.
_METHODS = {"register_hook", "requires_grad_", "is_floating_point", "is_complex", "is_contiguous", "element_size",
            "get_device", "retain_grad"}  # fmt: skip
_PROPERTIES = {"dtype", "device", "layout", "requires_grad", "grad_fn", "is_leaf", "is_cuda", "is_cpu", "is_sparse",
               "is_nested", "is_quantized", "is_meta", "output_nr", "retains_grad", "_base"}  # fmt: skip
# What engines do to what a module returns, to put a node of their own into autograd's graph.
_SAME = {"detach", "view_as"}

T = TypeVar("T", bound="_Disguised")


@dataclass(frozen=True)
class Step:
    """One thing that a model does to its logits: a function of torch by name, and its other arguments."""

    name: str
    numbers: tuple[float, ...] = ()

    def on(self, x: Tensor) -> Tensor:
        """It done to a tile of logits."""
        function: Callable[..., Tensor] = getattr(torch, self.name)
        return function(x, *self.numbers)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, ('logits', *self.numbers)))})"


class _Disguised(Tensor):
    """A tensor that only lets certain things be done to it."""

    def at_step(self: T, step: Step) -> T:
        """It after one thing that changes values."""
        raise NotImplementedError

    def again(self: T, data: Tensor) -> T:
        """The same disguise for other data."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", str(func)), kwargs or {}
        own = args[0] if args and isinstance(args[0], _Disguised) else None
        if own is not None and name.rstrip("_") in _ELEMENTWISE | _CASTS:
            if name.rstrip("_") in _CASTS:
                return own
            numbers = (*args[1:], *kwargs.values())
            if all(isinstance(one, int | float) for one in numbers):
                return own.at_step(Step(name.rstrip("_"), tuple(numbers)))
        if own is not None and name in _SAME:
            with torch._C.DisableTorchFunctionSubclass():
                return own.again(func(*args, **kwargs))
        if own is not None and name == "__get__":
            name = func.__self__.__name__  # type: ignore[attr-defined]
            if name in ("shape", "ndim"):
                return own.pretended if name == "shape" else len(own.pretended)
            if name == "_base":  # FSDP warns of views, for what would be done to them in place: nothing can be, here
                return None
            if name in _PROPERTIES:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args)
        if own is not None and name in ("size", "dim"):
            return len(own.pretended) if name == "dim" else own.pretended[args[1]] if args[1:] else own.pretended
        if own is not None and name in _METHODS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        told = ", ".join("logits" if one is own else type(one).__name__ for one in args)
        raise NotImplementedError(
            f"{name}({told}): with a tiled loss there are no logits, only a tile of them at a time. Turn it off "
            "(loss_tile=None) for what needs them, or leave the labels out"
        )

    pretended: torch.Size


class NotedLogits(_Disguised):
    """Notes what is done to it."""

    steps: list[Step]

    @classmethod
    def of(cls, shape: torch.Size) -> "NotedLogits":
        """One of logits of this shape."""
        made = torch.zeros(()).as_subclass(cls)
        made.pretended, made.steps = shape, []
        return made

    def at_step(self, step: Step) -> "NotedLogits":
        self.steps.append(step)
        return self

    def again(self, data: Tensor) -> "NotedLogits":
        return self


class LossAsLogits(_Disguised):
    """A loss, or log-probabilities, that a model takes for its logits; its data and its place in autograd's graph are
    theirs."""

    steps: tuple[Step, ...]
    done: int

    @classmethod
    def of(cls, loss: Tensor, shape: torch.Size, steps: tuple[Step, ...], done: int = 0) -> "LossAsLogits":
        """A loss (a scalar) for logits of this shape, to which `done` of `steps` were done."""
        made = loss.as_subclass(cls)
        made.pretended, made.steps, made.done = shape, steps, done
        return made

    def at_step(self, step: Step) -> "LossAsLogits":
        if self.steps[self.done : self.done + 1] != (step,):
            raise NotImplementedError(
                f"the model does {step} where it did {_told(self.steps[self.done :])} when its head was looked at: "
                "its loss cannot be tiled"
            )
        return LossAsLogits.of(self._plain(), self.pretended, self.steps, self.done + 1)

    def again(self, data: Tensor) -> "LossAsLogits":
        return LossAsLogits.of(data, self.pretended, self.steps, self.done)

    @property
    def is_loss(self) -> bool:
        """Whether it is one number."""
        return self._plain().dim() == 0

    def loss(self) -> Tensor:
        """The loss or the log-probabilities, a plain tensor.

        Raises NotImplementedError if the model left out what it did before.
        """
        if self.done != len(self.steps):
            raise NotImplementedError(
                f"the model left out {_told(self.steps[self.done :])}, which it did when its head was looked at: its "
                "loss cannot be tiled"
            )
        return self._plain()

    def _plain(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)


def _told(steps: Sequence[Step]) -> str:
    return ", ".join(map(str, steps)) or "nothing"
