"""Which rank failed first, and of what: said by every rank that fails with it.

A rank that raises takes its connections with it, and the others fail within milliseconds, of "Connection closed by
peer". torchrun shows the message of one of them, told apart by whole seconds. So the first to fail says so in the
store that the ranks met in, and whoever fails of lost connections looks there.
"""

import time
from contextlib import ContextDecorator

import torch
import torch.distributed as dist

KEY = "ringattn/first-failure"
SILENT = "the connection to another rank was lost, and no rank said why: it was killed, or its machine is gone"
PATIENCE = 3.0
"""Seconds that a rank waits which only lost its connections: torchrun ends it meanwhile, and reports the first."""


class PeerFailed(RuntimeError):
    """This rank stopped because another one failed first; the message says which and why."""


class FirstFailure(ContextDecorator):
    """`with FirstFailure():` around what all ranks run while their process group lasts, or `@FirstFailure()` on it. One
    may be used again and again, and inside of itself.

    An exception of a lost connection becomes `PeerFailed` with the rank and the message of the first to fail, if that
    could still say so. Every other one passes.
    """

    def __init__(self) -> None:
        self._before = _told()
        self._depth = 0

    def __enter__(self) -> None:
        self._depth += 1

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        # What was said up to here is no reason of a later failure.
        before, self._before = self._before, _told()
        if not isinstance(error, Exception):
            return
        if _lost_connection(error):
            raise PeerFailed(_wait_for_first(before)) from error
        _claim(error, before)
        self._before = _told()


def said(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}"


def _wait_for_first(before: str) -> str:
    """What another rank says after what was said `before`, all of PATIENCE later."""
    deadline = time.monotonic() + PATIENCE
    while (first := _told()) == before and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(max(0.0, deadline - time.monotonic()))
    return first if first != before else SILENT


def _lost_connection(error: BaseException) -> bool:
    """Whether an exception, or what it came from, is of a peer that is gone or late."""
    if isinstance(error, torch.OutOfMemoryError):  # which a library of connections may have met
        return False
    if isinstance(error, dist.DistError | ConnectionError):
        return True
    # gloo raises RuntimeError, with the place in its source
    if isinstance(error, RuntimeError) and ("gloo/" in str(error) or "NCCL" in str(error)):
        return True
    return error.__cause__ is not None and _lost_connection(error.__cause__)


def _claim(error: Exception, before: str) -> None:
    try:
        _store().compare_set(KEY, before, f"rank {dist.get_rank()} failed first: {said(error)}")
    except Exception:  # the store went with its rank: nobody is left to tell
        return


def _told() -> str:
    """What was said last; "" for nothing, or if the store went with the rank that held it."""
    try:
        store = _store()
        return store.get(KEY).decode() if store.check([KEY]) else ""
    except Exception:
        return ""


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
