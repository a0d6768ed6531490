"""How long a rank itself takes for its steps, without its waits for other ranks.

Under sequence parallelism all ranks wait for each other many times in a step, so that the slowest makes all steps
equally long. What tells it apart is that it waits least. On the host a thread looks now and then where the training
stands, which costs less than a thousandth and needs no change of what is measured: in a collective, or waiting for the
device, it waits for others. On a GPU collectives wait on the device; there the MLPs are timed, by events in the stream,
which hold kernels alone.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import nn

from ringattn.hf.layers import mlps_of

PERIOD = 0.02  # seconds between looks
EVERY = 10  # steps of which one is timed on the device
# Where the innermost Python function waits for other ranks, or for a device that does.
WAITS = tuple(
    path.replace("/", os.sep) for path in ("/torch/distributed/", "/parallel/transport/", "/training/loss.py")
)


class OwnTime(NamedTuple):
    """Of one rank over a window of steps, seconds a step.

    Arguments:
        own: not waiting for others; the wait for data is part of it.
        kernels: in MLPs on the device, 0 where there is none.
        data: waiting for batches.
        whole: of a step.
        looks: that found the rank at its own work: how far `own` can be trusted.
    """

    own: float
    kernels: float
    data: float
    whole: float
    looks: float


class OwnTimes:
    """Measures the steps of the thread that makes it, of which one at a time runs inside of `step`. `close` ends it."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._thread_id = threading.get_ident()
        self._measuring, self._end = False, threading.Event()
        self._kernels = _KernelTimes(model) if device.type == "cuda" else None
        self._count = 0
        self._clear()
        self._looker = threading.Thread(target=self._look, name="own-time", daemon=True)
        self._looker.start()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step and the wait for its batch."""
        started = time.perf_counter()
        self._count += 1
        timed = self._kernels is not None and self._count % EVERY == 0
        if timed and self._kernels is not None:
            self._kernels.on = True
        self._measuring = True
        try:
            yield
        finally:
            self._measuring = False
            self._seconds += time.perf_counter() - started
            self._steps += 1
            if timed and self._kernels is not None:
                self._kernels.on = False
                self._timed += 1

    def waited(self, seconds: float) -> None:
        """For a batch."""
        self._data += seconds

    def take(self) -> OwnTime:
        """Of the steps since the last time. The device has done them."""
        steps, looks = max(1, self._steps), max(1, self._own + self._others)
        kernels = self._kernels.seconds() / max(1, self._timed) if self._kernels is not None else 0.0
        whole = self._seconds / steps
        taken = OwnTime(whole * self._own / looks, kernels, self._data / steps, whole, float(self._own))
        self._clear()
        return taken

    def close(self) -> None:
        """Ends the thread and takes hooks off."""
        self._end.set()
        self._looker.join(timeout=5)
        if self._kernels is not None:
            self._kernels.close()

    def _clear(self) -> None:
        self._own = self._others = self._steps = self._timed = 0
        self._seconds = self._data = 0.0

    def _look(self) -> None:
        while not self._end.wait(PERIOD):
            if not self._measuring:
                continue
            file = _file_of(self._thread_id)
            if any(part in file for part in WAITS):
                self._others += 1
            else:
                self._own += 1


def _file_of(thread_id: int) -> str:
    """Of the function that a thread is in. Its frame is let go at once: as long as it is held, so are its tensors."""
    frame = sys._current_frames().get(thread_id)
    return frame.f_code.co_filename if frame is not None else ""


class _KernelTimes:
    """Events around every MLP's forward pass, while `on`."""

    def __init__(self, model: nn.Module) -> None:
        self.on = False
        self._spans: list[tuple[Any, Any]] = []
        self._open: dict[int, Any] = {}
        mlps: list[nn.Module] = []
        with suppress(NotImplementedError, ValueError):
            mlps = mlps_of(getattr(model, "module", model))
        self._hooks = [mlp.register_forward_pre_hook(self._before) for mlp in mlps]
        self._hooks += [mlp.register_forward_hook(self._after) for mlp in mlps]

    def _before(self, module: nn.Module, given: Any) -> None:
        if self.on:
            self._open[id(module)] = torch.cuda.Event(enable_timing=True)
            self._open[id(module)].record()

    def _after(self, module: nn.Module, given: Any, result: Any) -> None:
        begin = self._open.pop(id(module), None)
        if begin is not None:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._spans.append((begin, end))

    def seconds(self) -> float:
        """Of all passes since the last time."""
        total: float = sum(begin.elapsed_time(end) for begin, end in self._spans) / 1e3
        self._spans.clear()
        return total

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
