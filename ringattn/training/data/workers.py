"""Records are tokenized by several processes, in order: each gets a chunk, and the next one when it has answered.

They are started as programs of their own and not by `multiprocessing`: they end when the pipe to their parent does,
however the parent ended, and may be started by a process that is itself a child.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from ringattn.training.data.encoding import Encode, Encoded, Encoding
from ringattn.training.data.records import Record

CHUNK, CHUNK_BYTES = 256, 1 << 20
"""A chunk has so many records, or is cut after so many bytes."""
_MAIN = "import sys; from ringattn.training.data.workers import serve; serve(int(sys.argv[1]))"


@dataclass(frozen=True)
class Outcome:
    """A record's tokens, or why there are none.

    Arguments:
        encoded: None where there is an error, or no record.
        error: with the record's place; empty if there is none.
        size: bytes that the record took.
    """

    encoded: Encoded | None
    error: str
    size: int


def outcomes(records: Iterator[Record], encoding: Encoding, processes: int) -> Iterator[Outcome]:
    """What becomes of each record, in their order. With one process no other is started.

    Raises ValueError for a tokenizer that cannot be used, RuntimeError if a process ended.
    """
    if processes < 2:
        encode = encoding.build()
        for record in records:
            yield outcome(record, encode)
        return
    chunks = _chunks(records)
    workers: list[_Worker] = []
    try:
        for chunk in islice(chunks, processes):
            workers.append(_Worker(encoding))
            workers[-1].ask(chunk)
        waiting = list(workers)
        while waiting:
            worker = waiting.pop(0)
            answer = worker.answer()
            for chunk in islice(chunks, 1):
                worker.ask(chunk)
                waiting.append(worker)
            yield from answer
    finally:
        for worker in workers:
            worker.close()


def outcome(record: Record, encode: Encode) -> Outcome:
    """What becomes of one record."""
    error, encoded = record.error, None
    if record.value is not None:
        try:
            encoded = encode(record.value)
        except ValueError as problem:
            error = str(problem)
    return Outcome(encoded, f"{record.where}: {error}" if error else "", record.size)


def default_processes() -> int:
    """One for each core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    size = 0
    for record in records:
        chunk.append(record)
        size += record.size
        if len(chunk) == CHUNK or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _Worker:
    """One process. Its pipe holds one question or one answer, so that nobody waits for the other to read."""

    def __init__(self, encoding: Encoding) -> None:
        self._pipe, theirs = Pipe()
        path = os.pathsep.join(place or os.getcwd() for place in sys.path)
        variables = {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _MAIN, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=os.environ | variables | {"TOKENIZERS_PARALLELISM": "false"},
        )
        theirs.close()
        self._pipe.send(encoding)

    def ask(self, chunk: Sequence[Record]) -> None:
        self._talk(lambda: self._pipe.send(chunk))

    def answer(self) -> list[Outcome]:
        found = self._talk(self._pipe.recv)
        if isinstance(found, Exception):
            raise found
        answer: list[Outcome] = found
        return answer

    def close(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.wait()

    def _talk(self, call: Any) -> Any:
        try:
            return call()
        except (EOFError, OSError):
            raise RuntimeError(f"a process that tokenizes ended with exit code {self._process.wait()}") from None


def serve(number: int) -> None:
    """The process itself, with a pipe of this file descriptor: until that has no other end."""
    pipe = Connection(number)
    try:
        encoding: Encoding = pipe.recv()
        try:
            encode = encoding.build()
        except ValueError as error:
            pipe.recv()
            pipe.send(error)
            return
        while True:
            pipe.send([outcome(record, encode) for record in pipe.recv()])
    except (EOFError, OSError, KeyboardInterrupt):  # its parent has ended, in the middle of a message perhaps
        return
