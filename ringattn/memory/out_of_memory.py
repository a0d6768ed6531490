"""A step that runs out of memory says so once, with all that is needed to go on.

    watch = MemoryWatch(CudaMemory(torch.device("cuda:0")), folder)
    with watch.step(12) as at:
        at("forward pass")
        loss = model(ids)
        at("backward pass")
        loss.backward()

names the step and what it was doing, how the device's memory stood, the largest of what was in it, the key to change
next, and the file in which torch's allocator says the rest (https://pytorch.org/memory_viz reads it).
"""

import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ringattn.memory.host import GIB, HostMemory, host_memory

SHOWN = 5  # items, and kinds of blocks
FRAGMENTED = 0.05  # of a device's memory that is reserved and not in use: from here on it is worth a word
UNITS = {"B": 1, "bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
# Libraries that take memory of their own, and report it in their own words.
DEVICE_FULL = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|Cuda failure \d+ 'out of memory'|CU(?:BLAS|DNN)_STATUS_ALLOC_FAILED"
)
HOST_FULL = re.compile(r"can't allocate memory|cannot allocate memory|std::bad_alloc", re.IGNORECASE)


@dataclass(frozen=True)
class Figures:
    """How a device's memory stands, in bytes.

    Arguments:
        allocated: in use by tensors of this process.
        reserved: held by torch's allocator, these included.
        free: according to the driver.
        total: of the device.
    """

    allocated: int
    reserved: int
    free: int
    total: int


class DeviceMemory(Protocol):
    """The memory of one device."""

    name: str

    def figures(self) -> Figures:
        """At this moment."""

    def snapshot(self) -> dict[str, Any]:
        """What torch's allocator holds, as of `torch.cuda.memory._snapshot`."""


class CudaMemory:
    """The memory of a CUDA device.

    Arguments:
        stacks: notes from now on where each tensor was made, at some microseconds for each.
    """

    def __init__(self, device: torch.device, stacks: bool = False) -> None:
        self.device, self.name = device, f"{device} ({torch.cuda.get_device_name(device)})"
        if stacks:
            torch.cuda.memory._record_memory_history(enabled="state", stacks="python", device=device)

    def figures(self) -> Figures:
        free, total = torch.cuda.mem_get_info(self.device)
        allocated, reserved = torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)
        return Figures(allocated, reserved, free, total)

    def snapshot(self) -> dict[str, Any]:
        return torch.cuda.memory._snapshot(self.device)


class MemoryWatch:
    """Says what there is to say when memory runs out.

    Arguments:
        device: where the steps compute; its memory, or None if that is the host's.
        folder: for the allocator's snapshots. A file of this kind is some MB.
        rank: of this process, for messages and files.
        plan: bytes by item, as they were planned for this device.
        advice: from the bytes that were asked for in vain (0 if unknown) to what to change, in words.
        host: how the host's memory stands.
    """

    def __init__(
        self,
        device: DeviceMemory | None,
        folder: Path,
        rank: int = 0,
        plan: Mapping[str, int] | None = None,
        advice: Callable[[int], str] | None = None,
        host: Callable[[], HostMemory] = host_memory,
    ) -> None:
        self.device, self.folder, self.rank = device, folder, rank
        self.plan, self.advice, self.host = dict(plan or {}), advice, host

    @contextmanager
    def step(self, number: int) -> Iterator[Callable[[str], None]]:
        """Around a step; what it gives is told what the step does next.

        Raises torch.OutOfMemoryError or MemoryError with the whole report, from the one that came.
        """
        doing = ""

        def at(what: str) -> None:
            nonlocal doing
            doing = what

        try:
            yield at
        except (RuntimeError, MemoryError) as error:
            where = f"step {number} on rank {self.rank}" + (f", in its {doing}" if doing else "")
            if _of_device(error):
                raise torch.OutOfMemoryError(self._of_device(error, where, number)) from error
            if _of_host(error):
                raise MemoryError(self._of_host(error, where)) from error
            raise

    def _of_device(self, error: BaseException, where: str, step: int) -> str:
        asked, said = asked_for(str(error)), _first_line(error)
        lines = [f"{where}: the GPU's memory is full, " + (f"{_gib(asked)} more were wanted" if asked else said)]
        figures, snapshot = self._look(lines)
        if figures is not None and self.device is not None:
            lines += _standing(self.device.name, figures, snapshot)
        lines += _planned(self.plan, figures)
        if found := largest(snapshot):
            lines.append(f"largest in use: {'; '.join(found)}")
        if self.advice is not None:
            lines.append(f"to change next: {self.advice(asked)}")
        if snapshot:
            lines.append(self._write(snapshot, step))
        return "\n  ".join(lines)

    def _of_host(self, error: BaseException, where: str) -> str:
        lines = [f"{where}: the host's memory is full, {_first_line(error)}", str(self.host())]
        lines.append("to change next: fewer memory.host_layers, more host_bytes where you set them, or fewer ranks")
        return "\n  ".join(lines)

    def _look(self, lines: list[str]) -> tuple[Figures | None, dict[str, Any]]:
        """How the device stands. What fails here is less important than what it is about, and becomes a line."""
        if self.device is None:
            return None, {}
        try:
            return self.device.figures(), self.device.snapshot()
        except Exception as error:
            lines.append(f"{self.device.name} does not say how its memory stands: {error}")
            return None, {}

    def _write(self, snapshot: dict[str, Any], step: int) -> str:
        path = self.folder / f"out-of-memory-step{step}-rank{self.rank}.pickle"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pickle.dumps(snapshot))
        except OSError as error:
            return f"the allocator's snapshot could not be written: {error}"
        return f"snapshot: {path} (for https://pytorch.org/memory_viz)"


def asked_for(message: str) -> int:
    """Bytes that could not be had, from what torch says of it; 0 if it does not."""
    found = re.search(r"[Tt]ried to allocate ([\d.]+) ?([KMGT]?i?B|bytes)", message)
    return round(float(found[1]) * UNITS[found[2]]) if found and found[2] in UNITS else 0


def largest(snapshot: Mapping[str, Any]) -> list[str]:
    """The largest of what an allocator holds for tensors, those of one size and origin together."""
    bytes_of: Counter[tuple[int, str]] = Counter()
    number_of: Counter[tuple[int, str]] = Counter()
    for segment in snapshot.get("segments", ()):
        for block in segment["blocks"]:
            if block["state"] == "active_allocated":
                kind = block.get("requested_size", block["size"]), _origin(block.get("frames", ()))
                bytes_of[kind] += block["size"]
                number_of[kind] += 1
    return [
        f"{_gib(total)} in {number_of[size, origin]} of {_gib(size)}{origin}"
        for (size, origin), total in bytes_of.most_common(SHOWN)
    ]


def _origin(frames: Any) -> str:
    """Where a block was asked for: the innermost place outside of torch."""
    for frame in frames:
        if frame["filename"].endswith(".py") and "/torch/" not in frame["filename"]:
            return f" from {Path(frame['filename']).name}:{frame['line']} {frame['name']}"
    return ""


def _standing(name: str, figures: Figures, snapshot: Mapping[str, Any]) -> list[str]:
    unused = figures.reserved - figures.allocated
    others = max(figures.total - figures.free - figures.reserved, 0)
    lines = [
        f"{name}: {_gib(figures.allocated)} of {_gib(figures.total)} are in use by tensors, {_gib(unused)} are held by "
        f"torch's allocator without use, {_gib(others)} by others (libraries, programs), {_gib(figures.free)} are free"
    ]
    joined = snapshot.get("allocator_settings", {}).get("expandable_segments", False)
    if unused > FRAGMENTED * figures.total and not joined:
        lines.append(
            "what has no use is in pieces: PYTORCH_ALLOC_CONF=expandable_segments:True in the environment joins them"
        )
    return lines


def _planned(plan: Mapping[str, int], figures: Figures | None) -> list[str]:
    if not plan:
        return []
    first = sorted(plan.items(), key=lambda item: -item[1])[:SHOWN]
    total = sum(plan.values())
    line = f"planned: {_gib(total)} in all, of it {', '.join(f'{name} {_gib(amount)}' for name, amount in first)}"
    if figures is not None:
        more = figures.allocated - total
        line += f"; {_gib(abs(more))} {'more' if more > 0 else 'less'} than that are in use"
    return [line]


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _of_device(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or bool(DEVICE_FULL.search(str(error)))


def _of_host(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or bool(HOST_FULL.search(str(error)))


def _gib(amount: int) -> str:
    return f"{amount / GIB:.2f} GiB" if amount >= GIB // 100 else f"{amount / 2**20:.2f} MiB"
