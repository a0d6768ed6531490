"""Where a rank is, in memory that its node's monitor reads: some bytes of a mapped file, written without a system call.

A rank writes for itself alone, and a reader that meets half a write sees the other half a moment later.
"""

import mmap
import os
import struct
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ringattn.whereabouts import TRANSFERS

PHASES = (
    "starting", "joining", "data", "forward pass", "backward pass", "optimizer step", "saving", "done", "failed",
)  # fmt: skip
PHASE = {name: number for number, name in enumerate(PHASES)}
_TRANSFER = {name: number for number, name in enumerate(TRANSFERS, 1)}
SIZE = 1024
NO_LAYER = -1
LISTENS, TOLD = 1, 2  # flags: it stops after its step when a signal asks for it; it was asked

# Who it is, at 0: mark, rank, world size, local rank, pid, when it started (the kernel's ticks).
_WHO = struct.Struct("<4siiiiQ")
# Where it is, at 64: time of the change (the host's monotonic clock), layer, transfers in it, the last of them (0 for
# none), phase, flags, micro-step, step.
_WHERE = struct.Struct("<dhHBBBxiq")
_LAYER = struct.Struct("<dhHB")
# At 96: the attempt that all ranks agreed on, then hashes of the step's batch and of its plans.
_HASHES = struct.Struct("<QQQ")
# At 128: seconds of the last step, of its kernels, and two that are free.
_SECONDS = struct.Struct("<4d")
# At 192: a message of so many bytes.
_MESSAGE = struct.Struct("<H")
_AT_WHERE, _AT_HASHES, _AT_SECONDS, _AT_MESSAGE = 64, 96, 128, 192
_MARK = b"RAH2"


@dataclass(frozen=True)
class Standing:
    """What a record says.

    Arguments:
        rank, world_size, local_rank: its place in the run.
        pid, started: its process, and when that began in the kernel's ticks: pids are used again.
        changed: when it last wrote, by the host's monotonic clock.
        step, micro_step: counted from 1; 0 before the first.
        phase: one of PHASES.
        layer: decoder layer that it last entered, or left in the backward pass; -1 for none.
        transfers, transfer: how many transfers between ranks it has come to since, and what the last brings.
        listens, told: whether it stops at a signal after its step, and whether it was asked to.
        attempt: number that the ranks of one start agreed on; 0 before they met.
        batch, plans: hashes of what the step computes; equal on all ranks for plans, in a replica for batches.
        step_seconds, kernel_seconds: of the last step; 0 where they are not known.
        message: why it failed.
    """

    rank: int
    world_size: int
    local_rank: int
    pid: int
    started: int
    changed: float
    step: int
    micro_step: int
    phase: str
    layer: int
    transfers: int
    transfer: str
    listens: bool
    told: bool
    attempt: int
    batch: int
    plans: int
    step_seconds: float
    kernel_seconds: float
    message: str

    def where(self) -> str:
        """For people: the step, and how far it got in it."""
        if self.phase in ("starting", "joining", "done", "failed") and not self.step:
            return self.phase
        at = f"step {self.step}"
        if self.phase in ("forward pass", "backward pass"):
            at += f", micro-step {self.micro_step}"
        layer = "" if self.layer == NO_LAYER else f", layer {self.layer}"
        transfer = f", its transfer {self.transfers} ({self.transfer})" if self.transfers else ""
        return f"{at}, {self.phase}{layer}{transfer}"

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


class Record:
    """This rank's record. Each write is one store of some bytes, and none of them waits for anything.

    Arguments:
        memory: SIZE bytes to write to; those of a mapped file, or any others where nobody reads.
    """

    def __init__(self, memory: Any = None) -> None:
        self._memory = bytearray(SIZE) if memory is None else memory
        self._phase, self._layer, self._flags, self._micro_step, self._step = 0, NO_LAYER, 0, 0, 0
        self._transfers = self._transfer = 0
        self._hashes = [0, 0, 0]
        self._seconds = [0.0, 0.0, 0.0, 0.0]
        self._write()

    @classmethod
    def in_file(cls, path: Path, rank: int, world_size: int, local_rank: int, started: int) -> "Record":
        """A record in a new file. Raises OSError where it cannot be made."""
        partial = path.with_name(f".{path.name}")
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.ftruncate(descriptor, SIZE)
            memory = mmap.mmap(descriptor, SIZE)
        finally:
            os.close(descriptor)
        _WHO.pack_into(memory, 0, _MARK, rank, world_size, local_rank, os.getpid(), started)
        record = cls(memory)
        partial.rename(path)  # a reader finds it whole
        return record

    @property
    def step(self) -> int:
        return self._step

    def begin(self, step: int) -> None:
        """Of a step, counted from 1."""
        self._step, self._micro_step = step, 0

    def at(self, phase: str) -> None:
        """What the rank does next; a forward pass begins the next micro-step."""
        self._phase = number = PHASE[phase]
        self._micro_step += number == PHASE["forward pass"]
        self._layer, self._transfers, self._transfer = NO_LAYER, 0, 0
        self._write()

    def layer(self, number: int) -> None:
        """The decoder layer that it is in."""
        self._layer, self._transfers, self._transfer = number, 0, 0
        _LAYER.pack_into(self._memory, _AT_WHERE, time.monotonic(), number, 0, 0)

    def comes_to(self, transfer: str) -> None:
        """The transfer that it waits for next, one of TRANSFERS."""
        self._transfers, self._transfer = (self._transfers + 1) % 2**16, _TRANSFER[transfer]
        _LAYER.pack_into(
            self._memory, _AT_WHERE, time.monotonic(), self._layer, self._transfers, self._transfer
        )  # fmt: skip

    def listens(self, listening: bool) -> None:
        """Whether a signal makes it stop after its step."""
        self._flags = self._flags | LISTENS if listening else self._flags & ~LISTENS
        self._write()

    def told(self) -> None:
        """It was asked to stop. Called by a signal's handler."""
        self._flags |= TOLD
        self._write()

    def computes(self, batch: int | None = None, plans: int | None = None, attempt: int | None = None) -> None:
        """Hashes, each below 2^64, of what the step computes; None leaves one as it is."""
        for place, value in enumerate((attempt, batch, plans)):
            self._hashes[place] = self._hashes[place] if value is None else value
        _HASHES.pack_into(self._memory, _AT_HASHES, *self._hashes)

    def took(self, step: float | None = None, kernels: float | None = None) -> None:
        """Seconds of the last step and of its kernels; None leaves one as it is."""
        for place, value in enumerate((step, kernels)):
            self._seconds[place] = self._seconds[place] if value is None else value
        _SECONDS.pack_into(self._memory, _AT_SECONDS, *self._seconds)

    def failed(self, message: str) -> None:
        """Its last word; the first one stays."""
        if self._phase != PHASE["failed"]:
            text = message.encode(errors="replace")[: SIZE - _AT_MESSAGE - _MESSAGE.size]
            start = _AT_MESSAGE + _MESSAGE.size
            self._memory[start : start + len(text)] = text
            _MESSAGE.pack_into(self._memory, _AT_MESSAGE, len(text))
        self.at("failed")

    def _write(self) -> None:
        _WHERE.pack_into(
            self._memory, _AT_WHERE,
            time.monotonic(), self._layer, self._transfers, self._transfer,
            self._phase, self._flags, self._micro_step, self._step,
        )  # fmt: skip


def read_record(path: Path) -> Standing | None:
    """What the record in a file says; None if there is none."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if len(data) != SIZE or not data.startswith(_MARK):
        return None
    _, rank, world_size, local_rank, pid, started = _WHO.unpack_from(data, 0)
    changed, layer, transfers, transfer, phase, flags, micro_step, step = _WHERE.unpack_from(data, _AT_WHERE)
    attempt, batch, plans = _HASHES.unpack_from(data, _AT_HASHES)
    step_seconds, kernel_seconds, _, _ = _SECONDS.unpack_from(data, _AT_SECONDS)
    (length,) = _MESSAGE.unpack_from(data, _AT_MESSAGE)
    message = data[_AT_MESSAGE + _MESSAGE.size :][:length].decode(errors="replace")
    if phase >= len(PHASES) or transfer > len(TRANSFERS):
        return None
    return Standing(
        rank, world_size, local_rank, pid, started, changed, step, micro_step, PHASES[phase], layer,
        transfers, ("", *TRANSFERS)[transfer], bool(flags & LISTENS), bool(flags & TOLD),
        attempt, batch, plans, step_seconds, kernel_seconds, message,
    )  # fmt: skip
