"""Which transfer between ranks the host has come to, told to whoever watches this rank; by default nobody does."""

from collections.abc import Callable

TRANSFERS = "heads", "keys", "gradients of keys", "states", "rows of a recurrence", "features of images"
Listener = Callable[[str], None]


class _Watch:
    listener: Listener | None = None


def listen(listener: Listener | None) -> None:
    """Has `listener(transfer)` called before each wait for a transfer, one of TRANSFERS, in place of the one before;
    None ends it. It is called in the middle of a model's passes and has to be quick."""
    _Watch.listener = listener


def comes_to(transfer: str) -> None:
    """The host waits next for a transfer. On a GPU it goes on at once, and the device waits."""
    if _Watch.listener is not None:
        _Watch.listener(transfer)
