"""Ranks of `recipes/train.py` as forks of one process that has already imported what they need.

Imports are most of the life of a rank that trains a few steps. What a fork runs is the same: the recipe as `__main__`,
with its command line, environment and output. Only the interpreter's tear-down is left out, so some tests start ranks
of their own, under torchrun and as tasks of srun.
"""

import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
PRELOADED = [
    "tests.training.forked",
    "hydra",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "ringattn.training.engines.fsdp2",
    "ringattn.training.loop",
    "torch._inductor.compile_fx",  # DeepSpeed marks functions for the compiler as it is imported
    "transformers.models.llama.modeling_llama",
]


def fork_rank(arguments: Sequence[str], variables: dict[str, str], out: Path, err: Path) -> BaseProcess:
    """Starts one rank; what it writes is added to `out` and `err`, which may be one file.

    The process that all ranks fork from starts with the first call, in its environment. Libraries read some variables,
    such as the number of threads, as they are imported: these must be the same in every call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, variables, clear=True):
        forkserver.ensure_running()
    process = context.Process(target=_main, args=(list(arguments), variables, out, err), daemon=True)
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


def _main(arguments: list[str], variables: dict[str, str], out: Path, err: Path) -> None:
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = ["recipes/train.py", *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")
