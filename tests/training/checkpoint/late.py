"""Copies that are made as late as they may be, and whether they are still those of their moment."""

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ringattn.training.checkpoint.host_copy import HostCopy
from ringattn.training.checkpoint.random_states import random_states
from ringattn.training.checkpoint.saved_state import part_name
from ringattn.training.checkpoint.snapshot import snapshot_of
from ringattn.training.checkpoint.tensors import open_tensors
from ringattn.training.engines.interface import STATE
from ringattn.training.loop import Trainer
from ringattn.training.resuming.keeping import RANDOM
from tests.training.recipe import prepared


class LateStream:
    """Stands for `CopyStream` where there is no GPU: nothing is copied before somebody holds, or `arrive` is called.

    Arguments:
        told: gets "copied" when it is.
    """

    def __init__(self, told: list[str]) -> None:
        self._told, self._owed = told, list[tuple[Tensor, Tensor]]()
        self._copied = threading.Event()
        self._copied.set()
        self.awaited = threading.Event()

    def begin(self, copies: Iterable[tuple[Tensor, Tensor]]) -> None:
        assert not self._owed, "one copy at a time"
        self._owed = list(copies)
        self._copied.clear()
        self.awaited.clear()

    def arrive(self) -> None:
        if self._owed:
            for target, source in self._owed:
                target.copy_(source)
            self._told.append("copied")
        self._owed = []
        self._copied.set()

    hold = arrive

    def wait(self) -> None:
        self.awaited.set()
        assert self._copied.wait(30)


def differing(
    output: Path, late: Callable[[HostCopy], Callable[[], Any]], held: bool, *overrides: str
) -> tuple[int, set[str]]:
    """Of a run that saves after every step: how many tensors were compared, and the names of those that are not in
    the files what they were when they were saved.

    Arguments:
        late: makes the copy that comes next a late one; what it returns is called when it may come.
        held: False leaves out what makes the step wait for it.
    """
    given = ("run.steps=3", "run.keep=9", "run.async_save=true", "data.seq_len=64", *overrides)
    trainer = Trainer(prepared(*given, f"run.output={output}"))
    _count_passes(trainer.engine.model)
    copy = trainer.keeping._saves._copy
    assert copy is not None
    if not held:
        trainer.keeping.hold = lambda: None  # type: ignore[method-assign]
    expected, arrive = {}, lambda: None
    with trainer._batches() as stream:
        for step in (1, 2, 3):
            trainer._train_step(next(stream))
            arrive()
            trainer.keeping._saves.wait()
            snapshot = snapshot_of({STATE: trainer.engine.state(), RANDOM: random_states()})
            expected[step] = {name: tensor.cpu().clone() for name, tensor in snapshot.tensors.items()}
            arrive = late(copy)
            trainer.save()
    arrive()
    trainer.keeping.finish()
    found = set()
    for step, tensors in expected.items():
        file, _ = open_tensors(output / "checkpoints" / f"step-{step:08d}" / part_name(0))
        assert {*file.keys()} == {*tensors}
        found |= {name for name, tensor in tensors.items() if not torch.equal(file.get_tensor(name), tensor)}
    return sum(map(len, expected.values())), found


def _count_passes(model: nn.Module) -> None:
    """Gives a model a buffer that every forward pass changes."""
    model = getattr(model, "module", model)
    model.register_buffer("passes", torch.zeros((), device=next(model.buffers()).device))
    model.register_forward_pre_hook(lambda module, _: module.passes.add_(1) and None)
