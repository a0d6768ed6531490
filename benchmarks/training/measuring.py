"""One case measured: built, stepped, taken apart again.

GiB are 2^30 bytes. Every figure is the most of all ranks.
"""

import gc
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.training.alst import Alst, UnshardedAlst
from benchmarks.training.case import Case, Place
from benchmarks.training.kernel import Counts
from benchmarks.training.planned import plan_of
from benchmarks.training.rows import Ours, Plain, Row, Tools
from ringattn.parallel.machine.peak_flops import peak_flops
from ringattn.training.model.flops import StepFlops
from ringattn.training.model.models import empty_model

ROWS: dict[str, Callable[[Case, Place, Tools], Row]] = {
    "ours": Ours,
    "hf": Plain,
    "alst": Alst,
    "alst-unsharded": UnshardedAlst,
}
GIB = 2**30


@dataclass
class Result:
    """What was measured of a case. What is unknown is None, and `failure` says why there is nothing.

    Arguments:
        allocated, reserved: GiB of the GPU at most, from the model's first step on.
        left: GiB of it that were allocated before the model was built.
        pinned, resident: GiB of the host, locked for copies and of the whole process.
        first, seconds: of the first step, and of one of the others (the mean), with the optimizer's part `update`.
        per_gpu: tokens a second.
        waited: seconds of a step, the mean, that the device waited for copies to and from the host.
        floor: seconds that attention's kernel and the matrix products alone take; `share` is it by `seconds - update`.
        calls: of attention's kernel, forward and backward, of a layer in a step.
        planned: of ours GiB of the GPU, GiB of the host and seconds, as the planner has them; `peak` is its moment.
        loss: of the first step, the mean over the targets.
    """

    row: str
    tokens: int
    documents: int
    ranks: int
    states: str
    features: str = ""
    attention: str = "real"
    allocated: float | None = None
    reserved: float | None = None
    left: float | None = None
    pinned: float | None = None
    resident: float | None = None
    first: float | None = None
    seconds: float | None = None
    update: float | None = None
    waited: float | None = None
    per_gpu: float | None = None
    mfu: float | None = None
    floor: float | None = None
    share: float | None = None
    calls: tuple[float, float] = (0.0, 0.0)
    loss: float | None = None
    planned: tuple[float, float, float] | None = None
    peak: str = ""
    failure: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Steps:
    """Seconds of steps, and of their updates."""

    whole: list[float] = field(default_factory=list)
    updates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)


def measure(case: Case, place: Place, tools: Tools, after: Callable[[Row], None] | None = None) -> Result:
    """Builds a case, takes its steps, and lets it go. Collective.

    Arguments:
        after: is called with the row after its steps.

    A case that its row cannot do, or that has no room, has a result that says so. On several ranks a lack of room is
    raised instead: the other ranks wait in a collective, and only their end helps.
    """
    result = Result(
        case.row, case.docs.total, len(case.docs.lengths), place.ranks, told_states(case),
        attention="dry" if case.dry else "real",
    )  # fmt: skip
    free_memory()
    result.left = allocated(place.device)
    try:
        with tools.kernel.dry(case.dry):
            _fill(result, case, place, tools, after)
    except NotImplementedError as error:
        result.failure = str(error)
    except (RuntimeError, MemoryError) as error:
        if place.ranks > 1 or not is_lack_of_room(error):
            raise
        result.failure = told_lack(error)
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the step
    free_memory()
    return result


def is_lack_of_room(error: BaseException) -> bool:
    """Whether device or host had no room, whoever says so: torch's allocator, cuBLAS, NCCL or the driver."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        said in str(error) for said in ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    )


def told_lack(error: BaseException) -> str:
    """A lack of room in a few words."""
    return f"host memory: {error}" if isinstance(error, MemoryError) else "out of memory"


def _fill(result: Result, case: Case, place: Place, tools: Tools, after: Callable[[Row], None] | None) -> None:
    reset_peaks(place.device)
    row = ROWS[case.row](case, place, tools)
    try:
        result.features = row.features
        free_memory()
        reset_peaks(place.device)
        tools.kernel.counts = Counts()
        steps = _take_steps(row, case.steps + 1, place)
        counts, times = tools.kernel.counts, case.config.num_hidden_layers * (case.steps + 1)
        result.calls = counts.forward / times, counts.backward / times
        _note_memory(result, row, place)
        _note_times(result, steps, case, place, row.streams)
        if case.row == "ours":
            _note_plan(result, case, place)
        if after is not None:
            after(row)
    finally:
        row.close()


def _take_steps(row: Row, number: int, place: Place) -> Steps:
    steps = Steps()
    for _ in range(number):
        row.prepare()
        whole, update = Watch(place.device), Watch(place.device)
        dist.barrier()
        whole.start()
        loss = row.forward()
        row.backward(loss)
        update.start()
        row.update()
        update.stop()
        whole.stop()
        steps.whole.append(whole.seconds())
        steps.updates.append(update.seconds())
        steps.waits.append(row.waited)
        steps.losses.append(row.mean_of(loss.detach()))
        del loss
    return steps


class Watch:
    """Seconds between two places of the device's work, read when it is over."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if cuda else []
        self._times = [0.0, 0.0]

    def start(self) -> None:
        self._mark(0)

    def stop(self) -> None:
        self._mark(1)

    def _mark(self, which: int) -> None:
        if self._events:
            self._events[which].record()
        else:
            self._times[which] = time.perf_counter()

    def seconds(self) -> float:
        """Waits for the device."""
        if not self._events:
            return self._times[1] - self._times[0]
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1e3


def _note_memory(result: Result, row: Row, place: Place) -> None:
    pinned, resident = row.pinned + pinned_by_torch(), resident_bytes()
    numbers = [pinned, resident]
    if place.device.type == "cuda":
        numbers += [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]
    found = [number / GIB for number in place.most(*map(float, numbers))]
    result.pinned, result.resident = found[:2]
    if len(found) == 4:
        result.allocated, result.reserved = found[2:]


def _note_plan(result: Result, case: Case, place: Place) -> None:
    settled = plan_of(case, place)
    top = settled.alive.peak()
    result.planned = top.total / GIB, sum(settled.alive.host.values()) / GIB, settled.time.seconds
    result.peak = top.name


def _note_times(result: Result, steps: Steps, case: Case, place: Place, streams: int) -> None:
    later = slice(1, None)
    taken = steps.whole, steps.updates, steps.waits
    means = [sum(one[later]) / case.steps if case.steps else 0.0 for one in taken]
    result.first, seconds, update, waited = place.most(steps.whole[0], *means)
    result.loss = steps.losses[0]
    if not case.steps:
        return
    result.seconds, result.update, result.waited = seconds, update, waited
    tokens = streams * case.docs.total
    result.per_gpu = tokens / seconds / place.ranks
    peak = peak_flops(torch.cuda.get_device_name(place.device)) if place.device.type == "cuda" else None
    if peak is not None and not case.dry:
        flops = streams * StepFlops.of(empty_model(case.config), case.config)(case.docs.total, case.docs.lengths)
        result.mfu = flops / (seconds * place.ranks * peak)


def told_states(case: Case) -> str:
    states = case.states
    moments = states.moments if case.updates else "none"
    return f"weights {states.weights}, moments {moments}" + (", on the host" if states.states_on == "host" else "")


def free_memory() -> None:
    """Gives back what nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        if hasattr(torch._C, "_host_emptyCache"):
            torch._C._host_emptyCache()


def allocated(device: torch.device) -> float:
    """GiB of the GPU that are held now."""
    return torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else 0.0


def reset_peaks(device: torch.device) -> None:
    """Peaks count from now on, the process's own as well where the system lets us."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        if hasattr(torch.cuda, "reset_peak_host_memory_stats"):
            torch.cuda.reset_peak_host_memory_stats()
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def pinned_by_torch() -> int:
    """Bytes of host memory that torch's allocator of locked memory has held at most."""
    if not torch.cuda.is_available() or not hasattr(torch.cuda, "host_memory_stats"):
        return 0
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0))


def resident_bytes() -> int:
    """Bytes of this process in memory at most; 0 where the system does not tell."""
    with suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
