"""What torchrun repeats at its end of a script that somebody else wrote, and that need not wrap its main function."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.elastic.multiprocessing.errors import get_error_handler


@contextmanager
def told_to_torchrun() -> Iterator[None]:
    """Around what ranks do together: an exception inside reaches torchrun's summary."""
    try:
        yield
    except Exception as error:
        get_error_handler().record_exception(error)
        raise
