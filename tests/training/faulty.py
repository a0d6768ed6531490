"""The recipe with a fault in the second step of one rank: `torchrun tests/training/faulty.py RANK [overrides]`."""

import os
import runpy
import sys
from pathlib import Path

from ringattn.training import loop

rank = sys.argv[1]
sys.argv[:2] = [str(Path(__file__).parents[2] / "recipes" / "train.py")]
before = loop.Trainer._forward


def forward(self: loop.Trainer, local: loop.LocalPack):
    if os.environ["RANK"] == rank and self.step == 1:
        raise ArithmeticError("the fault of this test")
    return before(self, local)


loop.Trainer._forward = forward  # type: ignore[method-assign]
runpy.run_path(sys.argv[0], run_name="__main__")
