"""The recipe with a fault in the second step of one rank: `torchrun tests/training/faulty.py RANK [overrides]`.

With RANK:memory the fault is that of a GPU whose memory is full.
"""

import os
import runpy
import sys
from pathlib import Path

import torch

from ringattn.training import loop

rank, _, kind = sys.argv[1].partition(":")
sys.argv[:2] = [str(Path(__file__).parents[2] / "recipes" / "train.py")]
before = loop.Trainer._forward


def forward(self: loop.Trainer, local: loop.LocalPack, targets: int):
    if os.environ["RANK"] == rank and self.step == 1:
        if kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB. The rest is not read.")
        raise ArithmeticError("the fault of this test")
    return before(self, local, targets)


loop.Trainer._forward = forward  # type: ignore[method-assign]
runpy.run_path(sys.argv[0], run_name="__main__")
