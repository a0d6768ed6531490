"""Which rank failed first, and of what: said by every rank that fails with it, and last on the user's screen.

A rank that raises takes its connections with it, and the others fail within milliseconds, of "Connection closed by
peer". torchrun shows the message of one of them, told apart by whole seconds. So the first to fail says so in the
store that the ranks met in, and whoever fails of lost connections looks there.
"""

import json
import os
import time
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, record

_KEY = "ringattn/first-failure"
SILENT = "the connection to another rank was lost, and no rank said why: it was killed, or its machine is gone"
PATIENCE = 3.0
"""Seconds that a rank waits which only lost its connections: torchrun ends it meanwhile, and reports the first."""

P = ParamSpec("P")
R = TypeVar("R")


class PeerFailed(RuntimeError):
    """This rank stopped because another one failed first; the message says which and why."""


def naming_first_failure(work: Callable[P, R]) -> Callable[P, R]:
    """Wraps what all ranks run between the start and the end of their process group.

    An exception of a lost connection becomes PeerFailed with the rank and the message of the first to fail, if that
    could still say so.
    """

    @wraps(work)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return work(*args, **kwargs)
        except Exception as error:
            if not _lost_connection(error):
                _claim(error)
                raise
            deadline = time.monotonic() + PATIENCE
            while (first := _first()) is None and time.monotonic() < deadline:
                time.sleep(0.1)
            time.sleep(max(0.0, deadline - time.monotonic()))
            raise PeerFailed(first or SILENT) from error

    return wrapped


def reported(main: Callable[[], None]) -> Callable[[], object]:
    """Wraps the main function of a recipe: torchrun repeats at its end what an exception of a rank says."""
    return record(main, _Brief())


def report(message: str) -> bool:
    """Hands a message to torchrun, which repeats it at its end. False if this process was not started by it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return False
    said = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
    with open(path, "w") as file:
        json.dump({"message": said}, file)
    return True


class _Brief(ErrorHandler):
    """Reports the message alone: the traceback stands above, and the end of a screen is short."""

    def record_exception(self, e: BaseException) -> None:
        report(_said(e))


def _lost_connection(error: BaseException) -> bool:
    """Whether an exception, or what it came from, is of a peer that is gone or late."""
    if isinstance(error, dist.DistError | ConnectionError):
        return True
    # gloo raises RuntimeError, with the place in its source
    if isinstance(error, RuntimeError) and ("gloo/" in str(error) or "NCCL" in str(error)):
        return True
    return error.__cause__ is not None and _lost_connection(error.__cause__)


def _claim(error: Exception) -> None:
    try:
        _store().compare_set(_KEY, "", f"rank {dist.get_rank()} failed first: {_said(error)}")
    except Exception:  # the store went with its rank: nobody is left to tell
        return


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _first() -> str | None:
    try:
        store = _store()
        return store.get(_KEY).decode() if store.check([_KEY]) else None
    except Exception:
        return None


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
