"""Processes as forks of one that has only imported: torch and transformers take longer to import than most tests."""

import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from unittest import mock

PRELOADED = [
    "tests.pool",
    "tests.training.forked",
    "hydra",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "ringattn.training.engines.fsdp2",
    "ringattn.training.loop",
    "torch._inductor.compile_fx",  # DeepSpeed marks functions for the compiler as it is imported
    "transformers.models.llama.modeling_llama",
]


def forks() -> ForkServerContext:
    """The context whose `Process` is such a fork. What is not installed is not imported.

    The process that they fork from starts with the first call. It has never computed, so there are no threads or locks
    to copy; libraries that read the number of threads as they are imported have found 1. A fork does not see what the
    environment of its starter is now: hand it over.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return context
