"""What a step's time goes to: kernels in groups, and the time in which none ran."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.training.measuring import Watch
from benchmarks.training.rows import Row

# Parts of kernels' names; the first group that has one of them counts.
GROUPS = (
    ("communication", ("nccl", "memcpy ptop", "gloo", "c10d")),
    ("attention", ("flash", "fmha", "attention")),
    ("copies", ("memcpy", "memset", "copy_", "copy kernel", "catarray", "aten::copy", "aten::cat")),
    ("matmul", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk", "aten::mm", "aten::addmm", "aten::bmm")),
)
OTHER = "elementwise and other"
TOP = 25


class Event(NamedTuple):
    """One kernel's run, in microseconds."""

    name: str
    start: float
    stop: float


def group_of(name: str) -> str:
    """The group of a kernel by its name."""
    lower = name.lower()
    return next((group for group, parts in GROUPS if any(part in lower for part in parts)), OTHER)


def profile_step(row: Row, device: torch.device) -> tuple[list[Event], float]:
    """The kernels of one more step, on a CPU its operators, and its milliseconds."""
    cuda = device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    row.prepare()
    watch = Watch(device)
    if cuda:
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=[kind]) as profile:
        watch.start()
        row.backward(row.forward())
        row.update()
        watch.stop()
        milliseconds = watch.seconds() * 1e3
        if cuda:
            torch.cuda.synchronize()
    return [event for one in profile.events() if (event := event_of(one, cuda)) is not None], milliseconds


def event_of(one: Any, cuda: bool) -> Event | None:
    """A kernel of the profiler's; on a CPU an operator without those that it calls. None for what is neither."""
    start, stop = one.time_range.start, one.time_range.end
    if cuda:
        return Event(one.name, start, stop) if one.device_type == torch.autograd.DeviceType.CUDA else None
    return Event(one.name, start, start + one.self_cpu_time_total)


def busy_time(events: Iterable[Event]) -> float:
    """Microseconds in which at least one of the kernels ran."""
    busy, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda one: one.start):
        busy += max(0.0, event.stop - max(event.start, end))
        end = max(end, event.stop)
    return busy


def profile_table(title: str, events: Sequence[Event], milliseconds: float) -> list[str]:
    """Markdown of the groups and of the dearest kernels. Groups overlap: their sum may be more than the step."""
    groups: dict[str, list[Event]] = defaultdict(list)
    kernels: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        groups[group_of(event.name)].append(event)
        kernels[event.name].append(event)
    idle = milliseconds - busy_time(events) / 1e3
    names = [*(group for group, _ in GROUPS), OTHER]
    lines = [f"## {title}", "", "| | ms | share of the step | launches |", "|---|---|---|---|"]
    lines += [_profile_line(name, groups[name], milliseconds) for name in names]
    lines += [f"| no kernel ran | {idle:.2f} | {idle / milliseconds:.1%} | |", f"| step | {milliseconds:.2f} | | |", ""]
    dearest = sorted(kernels.items(), key=lambda item: -_total(item[1]))[:TOP]
    lines += ["| kernel | ms | share of the step | launches |", "|---|---|---|---|"]
    lines += [_profile_line(f"{group_of(name)}: `{name[:110]}`", found, milliseconds) for name, found in dearest]
    return [*lines, ""]


def _total(events: Iterable[Event]) -> float:
    """Milliseconds of all together."""
    return sum(event.stop - event.start for event in events) / 1e3


def _profile_line(name: str, events: Sequence[Event], milliseconds: float) -> str:
    total = _total(events)
    return f"| {name.replace('|', '/')} | {total:.2f} | {total / milliseconds:.1%} | {len(events)} |"
