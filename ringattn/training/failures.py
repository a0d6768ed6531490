"""What all ranks fail of together, and what torchrun repeats at its end of a rank that failed: the message alone, last
on the user's screen."""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType

from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, record

from ringattn.first_failure import said
from ringattn.training.secrets import redacted


class FailedTogether(RuntimeError):
    """A failure that ranks have agreed on: all of them raise it, with the same message, and rank 0 says it."""


def reported(main: Callable[[], None]) -> Callable[[], object]:
    """Wraps the main function of a recipe: torchrun repeats at its end what an exception of a rank says, and no
    traceback shows what looks like a secret."""
    recorded = record(main, _Brief())

    def run() -> object:
        sys.excepthook = _show
        threading.excepthook = lambda given: _show(given.exc_type, given.exc_value, given.exc_traceback)
        return recorded()

    return run


def _show(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    """What the interpreter prints of an exception that nobody catches."""
    text = "".join(traceback.format_exception(kind, error, trace))
    print(redacted(text), end="", file=sys.stderr, flush=True)


def report(message: str) -> bool:
    """Hands a message to torchrun, which repeats it at its end. False if this process was not started by it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return False
    told = {"message": redacted(message), "extraInfo": {"timestamp": str(int(time.time()))}}
    with open(path, "w") as file:
        json.dump({"message": told}, file)
    return True


class _Brief(ErrorHandler):
    """Reports the message alone: the traceback stands above, and the end of a screen is short."""

    def record_exception(self, e: BaseException) -> None:
        report(said(e))
