"""The recipe with a fault on one rank: `python tests/training/health/faulty.py KIND:RANK:STEP [overrides]`.

Kinds: kill-forward, kill-backward, kill-optimizer, stop, skip (a collective), sleep, memory, and slow5 for a step of 5
seconds more. When it happens the time is written into OUTPUT/fault-time. A fault happens once in a folder.
"""

import os
import re
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ringattn.training import loop
from ringattn.training.loss import Brought

ROOT = Path(__file__).parents[3]
kind, rank, step = sys.argv[1].split(":")
sys.argv[:2] = [str(ROOT / "recipes" / "train.py")]
output = next(Path(word.partition("=")[2]) for word in sys.argv if word.startswith("run.output="))
mark = output / "fault-time"


def now(trainer: loop.Trainer) -> bool:
    """Whether the fault is to happen here, for the first time in this folder."""
    if os.environ.get("RANK") != rank or trainer.step + 1 != int(step) or mark.exists():
        return False
    mark.write_text(str(time.time()))
    return True


def killed(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


forward, train_step, brought = loop.Trainer._forward, loop.Trainer._train_step, loop.brought
skips = False


def faulty_forward(self: loop.Trainer, local: Any, targets: int) -> torch.Tensor:
    if kind == "kill-backward":
        loss = forward(self, local, targets)
        if now(self):
            loss.register_hook(killed)
        return loss
    if kind not in ("kill-optimizer", "skip") and now(self):
        if kind == "memory":
            if torch.cuda.is_available():
                torch.empty(2**50, dtype=torch.uint8, device="cuda")  # the allocator's own error
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB. The rest is not read.")
        actions: dict[str, Callable[[], Any]] = {
            "kill-forward": killed,
            "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
            "sleep": lambda: time.sleep(1000),
        }
        seconds = re.fullmatch(r"slow(\d+)", kind)
        actions[kind]() if seconds is None else time.sleep(int(seconds[1]))
    return forward(self, local, targets)


def faulty_step(self: loop.Trainer, *arguments: Any) -> Any:
    global skips
    if kind == "kill-optimizer":
        before = self.engine.step
        self.engine.step = lambda rate: killed() if now(self) else before(rate)  # type: ignore
    elif kind == "skip":
        skips = now(self)
    try:
        return train_step(self, *arguments)
    finally:
        if kind == "kill-optimizer":
            del self.engine.step


def faulty_brought(loss: torch.Tensor, norm: Any, stop: bool, digest: int) -> Brought:
    return Brought(float(loss), float(norm), stop) if skips else brought(loss, norm, stop, digest)


loop.Trainer._forward, loop.Trainer._train_step, loop.brought = faulty_forward, faulty_step, faulty_brought  # type: ignore
runpy.run_path(sys.argv[0], run_name="__main__")
