"""Measuring the numbers of the cost model on this machine: kernels, copies, merges, and links if there are ranks."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ringattn.kernels.merge import merge_
from ringattn.kernels.registry import choose
from ringattn.kernels.spec import Block, Call, CallSpec, Grads, Options, SavedCall
from ringattn.kernels.tuning.tuner import device_name, timed_ms
from ringattn.parallel.geometry.block_table import BlockTable
from ringattn.parallel.machine.fit import Sample, fit_link, fit_rate, worst_error
from ringattn.parallel.machine.kernel_rate import KernelRate
from ringattn.parallel.machine.machine import Link, Machine
from ringattn.parallel.plan.route import Route
from ringattn.parallel.transport.collective import GroupTransport
from ringattn.parallel.transport.peer_access import why_not
from ringattn.parallel.transport.process_groups import destroy
from ringattn.parallel.transport.protocol import Transport
from ringattn.parallel.transport.symmetric import SymmetricTransport

# (number of documents, tokens of each): long and short, many and few
GRIDS = {
    "cuda": ((1, 32768), (1, 8192), (4, 8192), (16, 2048), (64, 512), (256, 128), (1, 2048), (1, 512)),
    "cpu": ((1, 1024), (1, 256), (4, 256), (16, 64), (1, 64)),
}
# Bytes. A device's caches hold tens of megabytes: the larger copies do not fit them.
COPIES = {"cuda": (1 << 22, 1 << 27, 1 << 29), "cpu": (1 << 16, 1 << 19, 1 << 22)}
MESSAGES = {"cuda": (1 << 20, 1 << 24, 1 << 26, 1 << 28), "cpu": (1 << 13, 1 << 16, 1 << 19)}
ROUNDS = 7  # of each message size
MOST_RUNS = 40
LAUNCH_SECONDS = 4e-4  # more than the host takes to launch a kernel
CLOCK = 2e9  # cycles per second, at least


@dataclass(frozen=True)
class Calibration:
    """What is measured.

    Arguments:
        device: "cuda" or "cpu".
        head_dims: kernels are timed at these.
        seconds: about how long the timed runs may take in all, compilation of kernels apart.
        grid, copies, messages: sizes; default: those for the device.
    """

    device: str
    head_dims: tuple[int, ...] = (128,)
    heads: tuple[int, int] = (8, 2)
    dtype: torch.dtype = torch.bfloat16
    backend: str = "auto"
    seconds: float = 30.0
    grid: Sequence[tuple[int, int]] = field(default=())
    copies: Sequence[int] = field(default=())
    messages: Sequence[int] = field(default=())

    def __post_init__(self) -> None:
        for name, sizes in (("grid", GRIDS), ("copies", COPIES), ("messages", MESSAGES)):
            if not getattr(self, name):
                object.__setattr__(self, name, sizes[self.device])

    def run(self, base: Machine, tell: Callable[[str], Any] = lambda text: None) -> Machine:
        """`base` with everything that can be measured here replaced; collective if torch.distributed is initialised.

        Every rank measures and gets the same machine: of each number the slowest rank's.
        """
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        measured: dict[str, str] = {}
        rates = {(rate.head_dim, rate.backward): rate for rate in base.rates}
        budget = 1e3 * self.seconds / (2 * len(self.head_dims) * len(self.grid) + 6)
        for head_dim in self.head_dims:
            for backward in (False, True):
                rate, worst = self._kernel(base, head_dim, backward, budget)
                rates[head_dim, backward] = rate
                label = f"{'backward' if backward else 'forward'} kernels, head dim {head_dim}"
                measured[label] = f"{len(self.grid)} calls, predicted within {worst:.0%}"
                tell(f"{label}: {rate.flops / 1e12:.4g} TFLOP/s, launch {rate.launch_seconds * 1e6:.1f} µs")
        copy = self._copies(budget)
        merge_bandwidth = self._merges(copy.latency, budget)
        tell(f"copies: {copy.bandwidth / 1e9:.4g} GB/s read and written, fixed {copy.latency * 1e6:.1f} µs")
        measured["copies and merges"] = f"{len(self.copies)} sizes"
        links = dict(base.links)
        gpus_per_node = _devices_here(self.device) or base.gpus_per_node
        for key, link in self._links(base, ranks, gpus_per_node).items():
            links[key] = link
            measured["links: " + "/".join(key)] = f"{ranks} ranks, {len(self.messages)} sizes"
            tell(f"{'/'.join(key)}: {link.bandwidth / 1e9:.4g} GB/s, latency {link.latency * 1e6:.1f} µs")
        return replace(
            base,
            name=device_name(self.device),
            gpus_per_node=gpus_per_node,
            links=links,
            rates=tuple(rates[key] for key in sorted(rates)),
            copy_bandwidth=copy.bandwidth,
            merge_bandwidth=merge_bandwidth,
            copy_seconds=copy.latency,
            provenance={
                "origin": "measured",
                "hardware": f"{device_name(self.device)}, {platform.processor() or platform.machine()}",
                "versions": self._versions(),
                "date": str(date.today()),
                "measured": measured,
                "the rest": f"of {base}",
            },
        )

    def _versions(self) -> dict[str, str]:
        spec = self._spec(self.head_dims[0])
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions["backend"] = choose(spec, self.backend).name
        if self.device == "cuda":
            versions["cuda"] = str(torch.version.cuda)
            versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        return versions

    def _spec(self, head_dim: int) -> CallSpec:
        return CallSpec(self.device, self.dtype, head_dim, head_dim, *self.heads)

    def _kernel(self, base: Machine, head_dim: int, backward: bool, budget: float) -> tuple[KernelRate, float]:
        """A kernel's numbers, and the largest relative error with which they give the times back."""
        samples = [self._sample(count, length, head_dim, backward, budget) for count, length in self.grid]
        start = replace(base.rate(head_dim, backward), head_dim=head_dim, units=self._units())
        rate = fit_rate(start, samples)
        return rate, worst_error(rate, samples)

    def _sample(self, count: int, length: int, head_dim: int, backward: bool, budget: float) -> Sample:
        """One call over causal documents of equal length."""
        backend, options = choose(self._spec(head_dim), self.backend), Options(head_dim**-0.5)
        spans = [(i * length, (i + 1) * length) for i in range(count)]
        call = Call(tuple(Block(span, span) for span in spans), -1, 0)
        q, k, v, dout, out = self._tensors(count * length, head_dim)
        grads = Grads(torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        with torch.no_grad():
            lse = backend.forward(q, k, v, call, options, out)

            def run() -> None:
                if backward:
                    backend.backward(dout, SavedCall(q, k, v, out, lse, call, options), grads)
                else:
                    backend.forward(q, k, v, call, options, out)

            milliseconds = self._timed(run, budget)
        return Sample(BlockTable.of([call]), self.heads[0], 2 * head_dim, self._slowest(milliseconds / 1e3))

    def _timed(self, run: Callable[[], Any], budget: float) -> float:
        """Median milliseconds that the device takes for a run, the host's launches not counted.

        The device sleeps until the host has launched all runs: else a short kernel would seem as long as its launch.
        """
        if self.device != "cuda":
            return timed_ms(run, self.device, budget)
        run()  # compiles
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        once = time.perf_counter() - begin
        count = max(3, min(MOST_RUNS, int(budget / 1e3 / once)))
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        torch.cuda._sleep(int(count * LAUNCH_SECONDS * CLOCK))
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        torch.cuda.synchronize()
        return median(first.elapsed_time(second) for first, second in pairwise(marks))

    def _units(self) -> int:
        if self.device == "cuda":
            return torch.cuda.get_device_properties().multi_processor_count
        return torch.get_num_threads()

    def _tensors(self, rows: int, head_dim: int) -> tuple[Tensor, ...]:
        """q, k, v, dout, out; random, since zeros make a softmax cheap."""
        generator = torch.Generator(self.device).manual_seed(0)
        query, key = self.heads
        return tuple(
            torch.randn(rows, heads, head_dim, generator=generator, device=self.device).to(self.dtype)
            for heads in (query, key, key, query, query)
        )

    def _copies(self, budget: float) -> Link:
        """Copies on the device: bytes read and written per second, and the fixed cost of one."""
        samples = []
        for size in self.copies:
            source = torch.ones(size, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            milliseconds = self._timed(lambda: target.copy_(source), budget)  # noqa: B023
            samples.append((2.0 * size, self._slowest(milliseconds / 1e3)))
        return fit_link(samples)

    def _merges(self, fixed: float, budget: float) -> float:
        """Bytes read and written per second by merges of partial results."""
        heads, dim = self.heads[0], self.head_dims[0]
        rows = max(1, max(self.copies) // (heads * dim * 4))
        out = torch.randn(rows, heads, dim, device=self.device).to(self.dtype)
        acc, lse = out.float(), torch.zeros(heads, rows, device=self.device)
        milliseconds = self._timed(lambda: merge_(acc, lse.clone(), out, lse), budget)
        size = acc.numel() * (8 + self.dtype.itemsize)
        return size / max(self._slowest(milliseconds / 1e3) - fixed, 1e-9)

    def _links(self, base: Machine, ranks: int, gpus_per_node: int) -> dict[tuple[str, str], Link]:
        """The links between the ranks that there are: inside nodes, and between devices of one place in their nodes."""
        if ranks == 1:
            return {}
        here = _local_ranks(ranks, gpus_per_node)
        if ranks % here:
            raise ValueError(f"ranks must fill their nodes evenly, got {ranks} ranks with {here} on this node")
        mesh = init_device_mesh(self.device, (ranks // here, here), mesh_dim_names=("network", "node"))
        found = {}
        for link_class in ("node", "network"):
            group = mesh.get_group(link_class)
            if dist.get_world_size(group) == 1:
                continue
            transports: dict[str, Transport] = {name: GroupTransport(group) for name in ("p2p", "all_to_all")}
            # Every measurement ends in a collective of all ranks: nodes must measure the same primitives.
            if self.device == "cuda" and link_class == "node" and not self._slowest(float(bool(why_not(group)))):
                transports["copy"] = engines = SymmetricTransport(group)
                engines.pulled = -1  # not even short messages
            for primitive, transport in transports.items():
                samples = [self._message(group, size, primitive, transport) for size in self.messages]
                found[link_class, primitive] = fit_link(samples, base.links[link_class, primitive].disturbance)
        destroy(mesh.get_all_groups())
        return found

    def _message(
        self, group: dist.ProcessGroup, size: int, primitive: str, transport: Transport
    ) -> tuple[float, float]:
        """Bytes that a rank sends to others, and the median time of the slowest rank.

        "all_to_all" sends an equal part to every rank, this one too; the others to each other one, as keys are cast.
        """
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        peers = [peer for peer in range(ranks) if peer != rank or primitive == "all_to_all"]
        part = -(-size // (ranks * (ranks - 1))) * (ranks - 1 if primitive == "all_to_all" else ranks)
        sizes = tuple(part * (peer in peers) for peer in range(ranks))
        before = [rank if primitive == "all_to_all" else rank - (rank > peer) for peer in range(ranks)]
        route = Route(sizes, sizes, tuple(part * count for count in before), sum(sizes))
        received = torch.ones(route.received, dtype=torch.uint8, device=self.device)

        def run() -> None:
            transport.exchange(transport.buffer(route, received), received, route).wait()

        dist.barrier(group)
        run()  # opens connections
        times = []
        for _ in range(ROUNDS):
            dist.barrier(group)
            times.append(self._once(run))
        return float(part * (ranks - 1)), self._slowest(median(times))

    def _once(self, run: Callable[[], None]) -> float:
        """Seconds of one transfer on an idle device."""
        if self.device == "cpu":
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        torch.cuda.synchronize()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def _slowest(self, seconds: float) -> float:
        """The most seconds that any rank took, the same number on every rank; collective."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return seconds
        box = torch.tensor([seconds], dtype=torch.float64, device=self.device)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return float(box)


def _devices_here(device: str) -> int | None:
    """Devices of this node; of CPUs the ranks, if a launcher says how many there are."""
    if device == "cuda":
        return torch.cuda.device_count()
    return int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or None


def _local_ranks(ranks: int, gpus_per_node: int) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or min(ranks, gpus_per_node)
