"""How a run ended, and the exit codes by which `ringattn train` says it."""

import torch

from ringattn.training.health.incidents import Ending

DONE, FAILED, CHANGE_FIRST, STOPPED = 0, 1, 2, 75
"""Exit codes of `ringattn train`: all steps are done; it failed, and the same command may come further; something has
to be changed first (configuration, memory); a signal stopped it with a checkpoint (EX_TEMPFAIL of sysexits.h)."""

# What the same command would meet again.
RECURS = (torch.OutOfMemoryError, MemoryError, ValueError, TypeError, NotImplementedError, ImportError)


def ending_of(steps: int, done: bool) -> Ending:
    """Of a run that ended as it should, with a checkpoint of so many steps."""
    if done:
        return Ending("done", False, f"all {steps} steps are done", steps)
    return Ending("stopped", True, f"a signal stopped it after step {steps}, with a checkpoint", steps)


def kind_of(error: BaseException) -> str:
    """Of the incident that an exception is."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out-of-memory"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "rank-failed"


def exit_code(ending: Ending) -> int:
    if ending.state == "done":
        return DONE
    if ending.state == "stopped":
        return STOPPED
    return FAILED if ending.restart else CHANGE_FIRST
