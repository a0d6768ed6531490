"""A process that makes batches: Python that plans in a thread takes the interpreter's lock from the launches.

It has no ranks and no device. A request is the mixers to plan for, an answer a batch or what went wrong. Signals
are its parent's alone, and it ends when its pipe does, however the parent ended.
"""

import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.parallel.planning.ahead import from_bytes, to_bytes
from ringattn.training.packs.batches import Batch
from ringattn.training.packs.placing import BatchMaker, LocalPack

_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}
_MAIN = "import sys; from ringattn.training.packs.making_process import serve; serve(int(sys.argv[1]))"


class MakingProcess:
    """A process that makes the batches of `maker`. It starts here and takes seconds for it; `close` ends it."""

    def __init__(self, maker: BatchMaker, mesh: SequenceMesh) -> None:
        self._maker, self._mesh = maker, mesh
        self._pipe, theirs = Pipe()
        # What a process blocks its children block from their first instant on, and this one never unblocks it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _MAIN, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=_environment(),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()

    def batches(self) -> Iterator[Batch[LocalPack]]:
        """The maker's batches, each asked for with the mixers that the maker has by then.

        Raises what was raised in the process, and RuntimeError if that ended.
        """
        self._send((self._mesh.shape, to_bytes(self._maker)))
        while True:
            self._send(self._maker.mixers)
            batch, error = from_bytes(self._receive(), self._mesh)
            if error is not None:
                raise error
            yield batch

    def close(self) -> None:
        """End the process. A thread that waits for a batch gets a RuntimeError."""
        self._process.kill()
        self._process.wait()

    def _send(self, value: Any) -> None:
        try:
            self._pipe.send(value)
        except ConnectionError:
            raise self._ended() from None

    def _receive(self) -> bytes:
        try:
            return self._pipe.recv_bytes()
        except (EOFError, ConnectionError):
            raise self._ended() from None

    def _ended(self) -> RuntimeError:
        return RuntimeError(f"the process that makes batches ahead ended with exit code {self._process.wait()}")


def _environment() -> dict[str, str]:
    """What the process finds: its parent's modules, no device, and one thread."""
    path = os.pathsep.join(place or os.getcwd() for place in sys.path)
    return os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def serve(number: int) -> None:
    """The process itself, with a pipe of this file descriptor: until that has no other end."""
    pipe = Connection(number)
    try:
        mesh, data = pipe.recv()
        maker: BatchMaker = from_bytes(data, mesh)
        batches = maker.batches()
        while True:
            maker.mixers = pipe.recv()
            try:
                answer = to_bytes((next(batches), None))
            except Exception as error:
                answer = _pickled(error)
            pipe.send_bytes(answer)
    except (EOFError, ConnectionError):
        return


def _pickled(error: Exception) -> bytes:
    """An error in a batch's place; one that cannot be sent by its name and message."""
    where = "in the process that makes batches ahead:\n" + "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(where)
    return to_bytes((None, error))
