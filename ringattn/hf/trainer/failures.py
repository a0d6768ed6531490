"""Who failed first: when one rank raises the others only see their connections close, and may be the last to speak."""

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

KEY = "ringattn/first_failure"


class FirstFailure:
    """`with failures:` around what ranks do together. Any exception inside reaches torchrun's summary, and a rank whose
    connection broke raises what the first rank to fail had to say.

    The first one leaves its message in the job's store: it is there before the connections of this rank close.
    """

    def __init__(self) -> None:
        self.before = _told()
        self.depth = 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.depth -= 1
        if self.depth:
            return
        if isinstance(error, Exception):
            try:
                if (first := self._first(error)) is not None:
                    raise RuntimeError(f"{first}; then here: {type(error).__name__}: {error}") from error
                get_error_handler().record_exception(error)
            except RuntimeError as told:
                get_error_handler().record_exception(told)
                raise
        self.before = _told()

    def _first(self, error: Exception) -> str | None:
        """What another rank said before this one's connection broke. None where this rank fails by itself."""
        if not _broken(error):
            text = f"rank {dist.get_rank()} failed first: {type(error).__name__}: {error}"
            _get_default_store().compare_set(KEY, self.before, text)
            return None
        told = _told()
        return told if told != self.before else None


def _told() -> str:
    try:
        store = _get_default_store()
        return store.get(KEY).decode() if store.check([KEY]) else ""
    except RuntimeError:  # the store went with the rank that held it
        return ""


def _broken(error: Exception) -> bool:
    """Whether this is what the failure of another rank looks like here."""
    closed = type(error) is RuntimeError and ("Connection closed by peer" in str(error) or "/gloo/" in str(error))
    return closed or isinstance(error, dist.DistError)
