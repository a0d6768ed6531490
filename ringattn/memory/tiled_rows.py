"""Modules that look at one token at a time, such as an MLP, in tiles of tokens.

An MLP holds several rows of its wide inner size for every token: 84 KB a token in an 8B model, against 8 KB of the
hidden state. In tiles only its input is kept, and each tile is computed again in the backward pass. (The idea is of
ALST, arXiv 2506.13996.)

Two things are different from a checkpoint around each tile. Gradients of parameters are added up over the tiles in
float32 and handed out once, so that they lose nothing with the number of tiles, and an engine reduces them once. And
beneath a checkpoint of the whole layer the module's forward pass does not run a third time: see `_Input`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ringattn.memory.modes import Modes
from ringattn.memory.products import linear_of, unset

TILE = 8192  # tokens


Rows = Callable[[Tensor], Tensor]


def tiled_rows(function: Rows, x: Tensor, parameters: Sequence[Tensor], tile: int, again: Rows | None = None) -> Tensor:
    """`function(x)`, computed in tiles of tokens, and computed again in the backward pass.

    Exact for every function of one token at a time. Random draws are repeated in the backward pass; they are others
    than those of `function(x)` in one piece.

    Arguments:
        function: from (..., n, E) to (..., n, F), for any number n of tokens.
        x: (..., t, E).
        parameters: all that `function` uses and that may want a gradient.
        tile: tokens of a tile, at least 1.
        again: what is called instead in the backward pass, where nobody looks at the values of what it returns.

    Returns: (..., t, F).
    """
    if not isinstance(tile, int) or isinstance(tile, bool) or tile < 1:
        raise ValueError(f"tile must be a number of tokens >= 1, got {tile!r}")
    wanted = [one for one in parameters if one.requires_grad]
    if x.shape[-2] <= tile or not torch.is_grad_enabled() or not (x.requires_grad or wanted):
        # One tile is what it is; and without gradients nothing is kept but the output.
        return function(x) if x.shape[-2] <= tile else _forward(function, x, tile)
    if x.requires_grad:
        x = _Input.apply(x)
        return _TiledRows.apply(x, x.grad_fn, (function, again or function), tile, *wanted)
    return _TiledRows.apply(x, None, (function, again or function), tile, *wanted)


class TiledModule:
    """A module whose forward pass is tiled from now on; `undo` gives it back.

    Arguments:
        module: takes one tensor (..., t, E), tokens in the last dimension but one, and returns one, or a tuple of them
            as mixtures of experts do with their router's scores; each token's row depends on that row alone.
        tile: tokens of a tile.
    """

    def __init__(self, module: nn.Module, tile: int = TILE) -> None:
        if not isinstance(tile, int) or isinstance(tile, bool) or tile < 1:
            raise ValueError(f"tile must be a number of tokens >= 1, got {tile!r}")
        self.module, self.tile, self._plain = module, tile, module.forward
        self._parts: tuple[_Part, ...] = ()  # of what it returns, if that is a tuple
        self._last: nn.Linear | None = None  # the layer whose output is the module's
        self._looked = False
        module.forward = self
        # Tells DeepSpeed's ZeRO-3 to gather the module's weights at once and not piece by piece in each tile, as its
        # `set_z3_leaf_module` does: it looks for this mark when an engine is made.
        module._z3_leaf = True  # type: ignore[assignment]

    def undo(self) -> None:
        """The module as it was."""
        self.module.__dict__.pop("_z3_leaf", None)
        if self.module.__dict__.get("forward") is self:
            del self.module.forward
            if self.module.forward != self._plain:  # it had been replaced before
                self.module.forward = self._plain

    @torch.compiler.disable
    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        if args or kwargs:
            more = ", ".join((*(type(one).__name__ for one in args), *kwargs))
            raise NotImplementedError(
                f"a tiled {type(self.module).__name__} takes one tensor and nothing else, got also {more}"
            )
        parameters = list(self.module.parameters())
        if any(hasattr(one, "ds_id") and not one.numel() for one in parameters):
            raise NotImplementedError(
                f"a tiled {type(self.module).__name__} has no weights here: with DeepSpeed's ZeRO-3 it must be tiled "
                "before deepspeed.initialize"
            )
        out = tiled_rows(self._tile, x, parameters, self.tile, self._tile_again)
        if not self._parts:
            return out
        parts = out.split([part.width for part in self._parts], -1)
        return tuple(part.apart(one) for part, one in zip(self._parts, parts, strict=True))

    def _tile(self, x: Tensor) -> Tensor:
        if self._looked:
            out = self._plain(x)
        else:
            out, self._last = _with_last_layer(self.module, self._plain, x)
            self._looked = True
        several = type(out) is tuple
        parts = tuple(_Part.of(one, x) for one in (out if several else (out,)))
        if not parts or any(part is None for part in parts):
            what = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise NotImplementedError(
                f"a tiled {type(self.module).__name__} must return tensors with a row for each of {tuple(x.shape)}, "
                f"got {what}"
            )
        if not several:
            return out
        self._parts = parts  # type: ignore[assignment]
        rows = [one.reshape(*x.shape[:-1], one.shape[-1]) for one in out]
        wide = functools.reduce(torch.promote_types, (one.dtype for one in rows))
        return torch.cat([one.to(wide) for one in rows], -1)

    def _tile_again(self, x: Tensor) -> Tensor:
        """As `_tile`, for the gradients alone: the last linear layer, a ninth of an MLP's work, is not computed."""
        if self._last is None or _has_hooks(self._last):
            return self._tile(x)
        modes = Modes(x.device)
        with _uncomputed(self._last) as made:
            out = self._plain(x)
        if len(made) == 1 and out is made[0] and out._version == 0:
            return out
        with modes.again():  # this time the module went another way
            return self._tile(x)


class _Part(NamedTuple):
    """One of several tensors that a module returns."""

    width: int
    dtype: torch.dtype
    flat: bool  # (t, F) where the input is (1, t, E)

    @classmethod
    def of(cls, out: Any, x: Tensor) -> "_Part | None":
        """None for what has no row for each of x."""
        if not isinstance(out, Tensor) or not out.dim() or not out.is_floating_point():
            return None
        flat = out.dim() < x.dim() and out.shape[:-1] == x.shape[-2:-1] and x.shape[:-2].numel() == 1
        return cls(out.shape[-1], out.dtype, flat) if flat or out.shape[:-1] == x.shape[:-1] else None

    def apart(self, rows: Tensor) -> Tensor:
        """It, from the rows of all tiles."""
        rows = rows.to(self.dtype)
        return (rows.flatten(0, -2) if self.flat else rows).contiguous()


def _with_last_layer(module: nn.Module, function: Rows, x: Tensor) -> tuple[Tensor, nn.Linear | None]:
    """What a module's function returns, and the linear layer whose output that is, if it is one."""
    outputs: list[tuple[nn.Linear, Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda layer, _, out: outputs.append((layer, out)))
        for layer in module.modules()
        if type(layer) is nn.Linear and not _has_hooks(layer)
    ]
    try:
        out = function(x)
    finally:
        for hook in hooks:
            hook.remove()
    return out, next((layer for layer, made in reversed(outputs) if made is out), None)


def _has_hooks(layer: nn.Module) -> bool:
    """Whether anyone else would see what the layer returns, or has replaced what it does."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)


@contextmanager
def _uncomputed(layer: nn.Linear) -> Iterator[list[Tensor]]:
    """A linear layer that returns memory as it finds it, with the gradients of what should be there."""
    made: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        made.append(linear_of(layer, x, unset))
        return made[-1]

    layer.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield made
    finally:
        del layer.forward


class _Input(torch.autograd.Function):
    """The same tensor; only this keeps it for the backward pass, and `_TiledRows` reads it here.

    A checkpoint around a layer computes the layer again until all that was kept is there. As nothing after this is
    kept, the tiles are not computed then: they would be, a third time, if `_TiledRows` itself kept its input, which
    autograd notes only when its forward pass is over.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _TiledRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, node: Any, functions: tuple[Rows, Rows], tile: int, *parameters: Tensor) -> Tensor:
        function, ctx.again = functions
        ctx.node, ctx.tile, ctx.parameters = node, tile, parameters
        ctx.input = x.detach() if node is None else None
        ctx.modes = Modes(x.device)
        return _forward(function, x, tile)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = (ctx.input,) if ctx.node is None else ctx.node.saved_tensors
        dout, dx = grads[0], torch.empty_like(x) if ctx.needs_input_grad[0] else None
        sums: list[Tensor | None] = [None] * len(ctx.parameters)
        with ctx.modes.again():
            for rows in _tiles(x, ctx.tile):
                own = x[rows].detach().requires_grad_(dx is not None)
                with torch.enable_grad():
                    out = ctx.again(own)
                wanted = ctx.parameters if dx is None else (own, *ctx.parameters)
                found = list(torch.autograd.grad(out, wanted, dout[rows], allow_unused=True))
                if dx is not None:
                    dx[rows] = found.pop(0)
                _add(sums, found)
                del out, found  # or they would be there beside those of the next tile
        return dx, None, None, None, *sums


def _forward(function: Rows, x: Tensor, tile: int) -> Tensor:
    """All tiles one after another into one tensor."""
    out: Tensor | None = None
    with torch.no_grad():
        for rows in _tiles(x, tile):
            part = function(x[rows])
            if out is None:
                out = part.new_empty(*x.shape[:-1], part.shape[-1])
            out[rows] = part
    assert out is not None
    return out


def _tiles(x: Tensor, tile: int) -> Iterator[tuple[Any, ...]]:
    for first in range(0, x.shape[-2], tile):
        yield ..., slice(first, first + tile), slice(None)


def _add(sums: list[Tensor | None], found: Sequence[Tensor | None]) -> None:
    """Adds gradients in float32 at least."""
    for number, grad in enumerate(found):
        if grad is None:
            continue
        total = sums[number]
        if total is None:
            sums[number] = grad.to(torch.promote_types(grad.dtype, torch.float32))
        else:
            total += grad
