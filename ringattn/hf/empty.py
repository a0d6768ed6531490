"""A rank without tokens: its model runs on one token that counts nowhere, since models of transformers fail on none.

The layout may leave a rank empty (one token on two ranks, a short evaluation batch), and its rank must still take part
in every collective of the forward and the backward pass. So the token is put in behind the caller's back: before the
forward pass every tensor with a row for each token gets one row, after it the outputs lose theirs again. Attention sees
through it and works on no tokens. Nothing depends on the row: it has no target, and its attention output is 0.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ringattn.hf.loss import IGNORE_INDEX
from ringattn.parallel.layout import Layout

_KEY = "cu_seq_lens_q"


class Placeholder:
    """Stands where the layout would: the layout of a rank without tokens, whose tensors hold one row that is none.

    Arguments:
        by: the module before whose forward pass the row was put in, and after which it is taken out.
    """

    def __init__(self, layout: Layout, by: nn.Module) -> None:
        self.layout, self.by = layout, by


def layout_of(value: Any) -> Any:
    """The layout behind a placeholder; everything else as it is."""
    return value.layout if isinstance(value, Placeholder) else value


def put_in(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook: the same keywords, with one row in place of none where this rank has no tokens."""
    layout = kwargs.get(_KEY)
    if not isinstance(layout, Layout) or layout.tokens():
        return args, kwargs
    filled = {name: _with_row(name, value) for name, value in kwargs.items()}
    return tuple(_with_row("input_ids", value) for value in args), filled | {_KEY: Placeholder(layout, module)}


def take_out(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook: the outputs of no tokens. They stay part of the graph, so that backward passes run."""
    placeholder = kwargs.get(_KEY)
    return _without_row(output) if isinstance(placeholder, Placeholder) and placeholder.by is module else output


def attend_to_none(out: Tensor) -> Tensor:
    """Attention's output for the row, (0, H, V) -> (1, H, V): zeros whose gradient goes through attention's own."""
    return torch.cat([out, out.new_zeros(1, *out.shape[1:])])


def _with_row(name: str, value: Any) -> Any:
    """(1, 0, ...) -> (1, 1, ...); for position_ids also (axes, 1, 0) -> (axes, 1, 1)."""
    if not isinstance(value, Tensor):
        return value
    dim = value.dim() - 1 if name == "position_ids" else 1
    if value.dim() < 2 or value.shape[dim] != 0:
        return value
    shape = [*value.shape[:dim], 1, *value.shape[dim + 1 :]]
    return torch.cat([value, value.new_full(shape, IGNORE_INDEX if "labels" in name else 0)], dim)


def _without_row(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output[:, :0] if tuple(output.shape[:2]) == (1, 1) else output
    if isinstance(output, tuple | list):
        parts = [_without_row(part) for part in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    if isinstance(output, dict):  # a ModelOutput is one
        for name, part in output.items():
            output[name] = _without_row(part)
    return output
