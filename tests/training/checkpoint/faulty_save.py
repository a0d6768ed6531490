"""The recipe with a fault in a rank: `faulty_save.py FOLDER RANK:KIND@FIRST-LAST [overrides]`.

KIND: `kill` ends the rank with SIGKILL in the middle of writing a checkpoint of the steps FIRST to LAST, `ENOSPC` and
the like fail there as a disk does, and `step` ends it with SIGKILL in the forward pass of the step FIRST. When a fault
happens, `FOLDER/happened` is written.
"""

import errno
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

from ringattn.training import loop
from ringattn.training.checkpoint import writing

folder, spec = Path(sys.argv[1]), sys.argv[2]
sys.argv[:3] = [str(Path(__file__).parents[3] / "recipes" / "train.py")]
rank, _, rest = spec.partition(":")
kind, _, steps = rest.partition("@")
first, _, last = steps.partition("-")
mine = os.environ["RANK"] == rank


def happen(kind: str) -> None:
    (folder / "happened").touch()
    if kind in ("kill", "step"):
        os.kill(os.getpid(), signal.SIGKILL)
    number = getattr(errno, kind)
    raise OSError(number, os.strerror(number), "rank-0000x.safetensors")


def write_part(where: Path, number: int, snapshot: Any, before: Any = writing.write_part) -> Any:
    found = before(where, number, snapshot)
    step = int(where.name.split("-")[1].split(".")[0])
    if mine and kind != "step" and int(first) <= step <= int(last or first):
        os.truncate(where / f"rank-{number:05d}.safetensors", found.size // 2)
        happen(kind)
    return found


def forward(self: loop.Trainer, *rest: Any, before: Any = loop.Trainer._forward) -> Any:
    if mine and kind == "step" and self.step + 1 == int(first):
        happen(kind)
    return before(self, *rest)


writing.write_part = write_part
loop.Trainer._forward = forward  # type: ignore[method-assign]
runpy.run_path(sys.argv[0], run_name="__main__")
