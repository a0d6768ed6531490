"""Which module made the first number of a step that is not finite: found by doing the step's passes once more.

The hooks look at every output, which waits for the device each time: they are there for that one repetition only.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ringattn.training.engines import Engine
from ringattn.training.packs.batches import Batch
from ringattn.training.packs.packing import PackPlan
from ringattn.training.packs.placing import LocalPack


@dataclass
class Finding:
    """The first number that was not finite on a rank.

    Arguments:
        module: its full name in the model.
        how: in words, which follow the name.
        micro: which of the rank's micro-steps, from 0.
        order: of the place among all that are looked at in a micro-step, the same on every rank: what one rank makes
            spreads to the others, which find it later.
        rows: of the rank's tokens, those that have such numbers; empty where that cannot be told.
    """

    module: str
    how: str
    micro: int = 0
    order: int = 0
    rows: list[int] = field(default_factory=list)


def first_culprit(
    engine: Engine, forward: Callable[[LocalPack], Tensor], batch: Batch[LocalPack], device: torch.device
) -> Finding | None:
    """Repeats the passes of a step that was left out; what this rank found, or None. Collective over all ranks.

    Random generators are left as they are found, and no gradient stays. An engine that cannot take back a backward pass
    repeats the forward pass alone.
    """
    devices = [] if device.type == "cpu" else [device]
    finding: Finding | None = None
    with torch.random.fork_rng(devices), torch.set_grad_enabled(engine.goes_back_twice):
        for micro, local in enumerate(batch.micro):
            with watched(engine.model) as watch:
                loss = forward(local)
                if engine.goes_back_twice:
                    engine.backward(loss)
            if finding is None and watch.found is not None:
                finding, finding.micro = watch.found, micro
    engine.forget()
    return finding


class _Watch:
    """What the hooks have seen; only the first counts."""

    def __init__(self) -> None:
        self.found: Finding | None = None
        self._count = 0

    def after_forward(self, name: str, module: nn.Module, given: Any, kwargs: Any, result: Any) -> None:
        self._count += 1
        if self.found is not None:
            return
        for tensor in _floating((given, kwargs)):
            if (rows := _bad_rows(tensor)) is not None:
                parent, _, own = name.rpartition(".")
                self._note(parent, f"in the forward pass, before its {own}", rows)
                return
        for tensor in _floating(result):
            if (rows := _bad_rows(tensor)) is not None:
                how = "in the forward pass" if _weights_are_finite(module) else "whose weights are not finite"
                self._note(name, how, rows)
                return
            if tensor.requires_grad:
                tensor.register_hook(partial(self._of_gradient, name))

    def _of_gradient(self, name: str, gradient: Tensor) -> None:
        self._count += 1
        if self.found is None and (rows := _bad_rows(gradient)) is not None:
            self._note(name, "in the backward pass, in the gradient of its output", rows)

    def _note(self, name: str, how: str, rows: list[int]) -> None:
        self.found = Finding(name or "the model", how, order=self._count, rows=rows)


@contextmanager
def watched(model: nn.Module) -> Iterator[_Watch]:
    """Hooks on every module of a model, for as long as this lasts."""
    watch = _Watch()
    hooks = [
        module.register_forward_hook(partial(watch.after_forward, name.removeprefix("module.")), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


def documents_of(plan: PackPlan, indices: Iterable[int] | None) -> list[dict[str, int]]:
    """The documents of a pack that hold any of these tokens of it; None: all of them.

    Each is named by its number in the corpus and the first and last (excluded) of its tokens that the pack holds.
    """
    wanted = None if indices is None else sorted(indices)
    found, begin = [], 0
    for segment in plan.segments:
        end = begin + segment.stop - segment.start
        if wanted is None or any(begin <= index < end for index in wanted):
            found.append({"document": segment.document, "start": segment.start, "stop": segment.stop})
        begin = end
    return found


def _floating(values: Any) -> Iterator[Tensor]:
    """Tensors of floating point in arguments or results, however nested; masks may well be infinite."""
    if isinstance(values, Tensor):
        if values.is_floating_point():
            yield values
    elif isinstance(values, dict):
        for name, value in values.items():
            if name != "attention_mask":
                yield from _floating(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _floating(value)


def _bad_rows(tensor: Tensor) -> list[int] | None:
    """Rows of (1, t, ...) with numbers that are not finite, empty for another shape; None if all are finite."""
    good = torch.isfinite(tensor.detach())
    if bool(good.all()):
        return None
    if good.ndim < 2 or good.shape[0] != 1:
        return []
    rows: list[int] = (~good[0].flatten(1).all(1)).nonzero()[:, 0].tolist() if good.ndim > 2 else []
    return rows


def _weights_are_finite(module: nn.Module) -> bool:
    return all(bool(torch.isfinite(p.detach()).all()) for p in module.parameters(recurse=False) if p.numel())
