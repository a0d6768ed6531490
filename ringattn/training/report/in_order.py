"""Calls that nobody waits for, done by a thread one after another."""

import queue
import threading
from collections.abc import Callable


class InOrder:
    """Does what it is given in a thread, in the order in which it is given. `close` ends it."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def __call__(self, do: Callable[[], object]) -> None:
        """Soon. Raises what an earlier call raised; after that nothing is done any more."""
        if self._error is not None:
            raise self._error
        self._calls.put(do)

    def wait(self) -> None:
        """Until what it was given so far is done. Raises what a call raised."""
        done = threading.Event()
        self(done.set)
        while not done.wait(0.1) and self._error is None:
            pass
        if self._error is not None:
            raise self._error

    def close(self, seconds: float | None = None) -> None:
        """Waits until all is done, or for so long. Raises what a call raised."""
        self._calls.put(None)
        self._thread.join(seconds)
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (do := self._calls.get()) is not None:
            try:
                do()
            except BaseException as error:  # for the thread that asked
                self._error = error
                return
