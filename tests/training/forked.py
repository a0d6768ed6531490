"""Ranks of a recipe, `recipes/train.py` by default, as forks of a process that has already imported what they need.

Imports are most of the life of a rank that trains a few steps. What a fork runs is the same: the recipe as `__main__`,
with its command line, environment and output. Only the interpreter's tear-down is left out, so some tests start ranks
of their own, under torchrun and as tasks of srun.
"""

import os
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.forks import forks

ROOT = Path(__file__).parents[2]


def fork_rank(
    arguments: Sequence[str],
    variables: dict[str, str],
    out: Path,
    err: Path,
    fault: Callable[[], object] | None = None,
    script: str = "recipes/train.py",
) -> BaseProcess:
    """Starts one rank; what it writes is added to `out` and `err`, which may be one file.

    Arguments:
        fault: called in the rank before the recipe, to break something in it; a function of a module, or a `partial`.
        script: what runs as `__main__`.
    """
    process = forks().Process(target=_main, args=(script, list(arguments), variables, out, err, fault), daemon=True)
    process.start()
    return process


def all_end(ranks: Sequence[BaseProcess], seconds: float) -> bool:
    """Whether all ranks end by themselves in time; those that do not are killed."""
    deadline = time.monotonic() + seconds
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    late = [rank for rank in ranks if rank.exitcode is None]
    for rank in late:
        rank.kill()
        rank.join()
    return not late


def _main(
    script: str,
    arguments: list[str],
    variables: dict[str, str],
    out: Path,
    err: Path,
    fault: Callable[[], object] | None,
) -> None:
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = [script, *arguments]
    if fault is not None:
        fault()
    runpy.run_path(sys.argv[0], run_name="__main__")
