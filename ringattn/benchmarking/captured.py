"""Steps as replays of captured CUDA graphs: what the host takes to issue a step is gone, from every contestant alike.

A plan that stays the same for many steps can be captured by its user, and so can the kernel alone and other systems.
Times of replays are compared with times of replays only.
"""

import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.benchmarking.contestants import FILLING, Contestant, Entry, told
from ringattn.benchmarking.problem import NAMES, Problem

SUFFIX = "+graph"
# Calls before a capture: they compile, connect the ranks, and fill what arrives where nothing is sent.
WARMUPS = FILLING
REPLAYS = 3  # one after another, before results are looked at: a replay may spoil what the next one reads


class Uncaptured(RuntimeError):
    """A step that cannot be captured, for a reason that is the same on all ranks."""


@dataclass
class Captured:
    """A contestant whose steps are captured: it enters as it is, and the suite replaces its steps by `replays`.

    Arguments:
        make: the contestant, with transports that nobody else has. Those that were captured have barriers more from
            then on, and a failed capture leaves half an exchange in them.
    """

    make: Callable[[], Contestant]
    of: Contestant = field(init=False)

    def __post_init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Begin anew after a failed capture. Collective, if `make` is."""
        self.of = self.make()

    @property
    def name(self) -> str:
        return self.of.name + SUFFIX

    @property
    def peer(self) -> bool:
        return self.of.peer

    def missing(self, problem: Problem) -> str | None:
        return uncapturable(problem.device) or self.of.missing(problem)

    def enter(self, problem: Problem) -> Entry:
        return self.of.enter(problem)


def uncapturable(device: torch.device) -> str | None:
    """Why nothing can be captured here, or None: the same on every rank."""
    if device.type != "cuda":
        return f"can be captured on CUDA devices only, got {device.type}"
    if dist.get_backend() == "gloo":
        return "cannot be captured over gloo, which moves data on the host"
    return None


@dataclass(frozen=True)
class Recording:
    """A captured step. `result`: what it returned, in the memory that replays write to. `held`: bytes of memory that
    were reserved for it, on the rank that needs most."""

    graph: torch.cuda.CUDAGraph
    result: Any
    held: int


class Graphs:
    """Graphs of one problem, in one pool of memory: they are replayed in turns, and a capture's result is dropped
    before the next capture, which may write over it.

    `close` frees them all. NCCL waits for that when its process group ends.
    """

    def __init__(self) -> None:
        self._graphs: list[torch.cuda.CUDAGraph] = []

    @cached_property
    def _pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    def capture(self, step: Callable[[], Any], shared: bool = True) -> Recording:
        """Capture a step whose inputs stay where they are. Nothing is replayed before all ranks have it. Collective.

        Arguments:
            shared: in the common pool, or else in one of its own.

        Raises Uncaptured on all ranks if any of them cannot.
        """
        recording, reason = None, ""
        try:
            recording = self.record(step, shared)
        except Exception as raised:
            reason = told(raised)
        reason, held = agreed(reason, recording.held if recording else 0)
        if reason or recording is None:
            raise Uncaptured(f"cannot be captured: {reason}")
        return replace(recording, held=held)

    def held(self, step: Callable[[], Any]) -> int:
        """Bytes that a graph of the step holds for as long as it lives. Collective, raises as `capture`."""
        # In a pool of its own, where nothing is left of others. What fails, fails here: torch does not free the pool
        # of a failed capture before it ends, and this one is nobody else's.
        recording = self.capture(step, shared=False)
        self._graphs.remove(recording.graph)
        recording.graph.reset()
        return recording.held

    def record(self, step: Callable[[], Any], shared: bool = True) -> Recording:
        """Capture a step on this rank alone; raises what the step or its capture raises."""
        self._warm(step)
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        graph, pool = torch.cuda.CUDAGraph(), self._pool if shared else torch.cuda.graph_pool_handle()
        result, failure = None, None
        try:
            # The outer context restores the stream when the inner one fails to. NCCL's watchdog asks for events
            # meanwhile, on a thread of its own: only this thread's calls may end the capture.
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    result = step()
                except Exception as raised:
                    failure = raised
                    raise
        except Exception as raised:
            # torch < 2.12 leaves its allocator in the capture, where nothing is freed that two streams have used.
            with suppress(Exception):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise failure or raised from None  # that the capture ends badly is told too, but it is not the reason
        self._graphs.append(graph)
        return Recording(graph, result, torch.cuda.memory_reserved() - before)

    def _warm(self, step: Callable[[], Any]) -> None:
        """Run it on the stream of captures."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARMUPS):
                step()
        current.wait_stream(self._stream)
        torch.cuda.synchronize()

    def close(self) -> None:
        if self._graphs:
            torch.cuda.synchronize()
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()


def agreed(reason: str, held: int = 0) -> tuple[str, int]:
    """The reasons of all ranks as one, "" if no rank has any, and the most bytes of any rank. Collective."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (reason, held))
    reasons, most = [one for one, _ in found], max(held for _, held in found)
    if len(set(reasons)) == 1:
        return reasons[0], most
    return next(f"rank {rank}: {one}" for rank, one in enumerate(reasons) if one), most


@dataclass(frozen=True)
class Replays:
    """Captured steps: forward, forward and backward, and the latter without transfers, if that can be had.

    `held`: bytes that the graph of both passes holds. `errors`: of what they left, by name.
    """

    forward: Callable[[], None]
    both: Callable[[], None]
    silent: Callable[[], None] | None
    held: int
    errors: dict[str, float]


def replays(problem: Problem, entry: Entry, graphs: Graphs) -> Replays:
    """A contestant's steps, with the errors of their replays to `Problem.expected`. Collective.

    Raises Uncaptured on all ranks alike.
    """
    held = graphs.held(lambda: _detached(entry.both()))
    forward, out = _replayed(problem, entry, graphs.capture(lambda: _detached([entry.forward()])))
    both, errors = _replayed(problem, entry, graphs.capture(lambda: _detached(entry.both())))
    silent = None
    if entry.silent is not None:
        silent = graphs.capture(entry.silent).graph.replay
        for x in entry.arrived:  # of zeros, and of what is no number, kernels take another time
            x.normal_()
    return Replays(forward, both, silent, held, _worse(errors, out))


def ceiling_replays(problem: Problem, graphs: Graphs) -> Replays:
    """The kernel alone, with the differences of replays to its own results. Collective, raises as `replays`."""
    share = problem.share
    _ = problem.expected  # which it computes from results that are written over here
    held = graphs.held(share.both)
    forward, out = _rewritten(problem, graphs.capture(share.forward), 1)
    both, errors = _rewritten(problem, graphs.capture(share.both), len(NAMES))
    return Replays(forward, both, None, held, _worse(errors, out))


def _detached(results: Sequence[Tensor]) -> list[Tensor]:
    """Without what autograd would keep for them."""
    return [x.detach() for x in results]


def _worse(errors: dict[str, float], others: dict[str, float]) -> dict[str, float]:
    return {name: max(error, others.get(name, 0.0)) for name, error in errors.items()}


def _replayed(problem: Problem, entry: Entry, recording: Recording) -> tuple[Callable[[], None], dict[str, float]]:
    """The errors of what a replay leaves: nothing was computed in its memory before."""
    for x in recording.result:
        x.fill_(float("nan"))
    for _ in range(REPLAYS):
        recording.graph.replay()
    return recording.graph.replay, problem.errors(entry.layout, recording.result)


def _rewritten(problem: Problem, recording: Recording, count: int) -> tuple[Callable[[], None], dict[str, float]]:
    """The differences of what a replay writes to the first `count` of out, dq, dk, dv to what was written before."""
    written = [problem.share.out, *problem.share.grads][:count]
    before = [x[problem.samples].float() for x in written]
    for x in written:
        x.zero_()
    for _ in range(REPLAYS):
        recording.graph.replay()
    norms = [(x[problem.samples].float() - y).norm() ** 2 for x, y in zip(written, before, strict=True)]
    sums = torch.stack([*norms, *(y.norm() ** 2 for y in before)]).double()
    dist.all_reduce(sums)
    found = (sums[:count] / sums[count:]).sqrt().tolist()
    return recording.graph.replay, dict(zip(NAMES, found, strict=False))
