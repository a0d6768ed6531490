"""The points of `ringattn simulate`: packs of documents on a number of GPUs, and how fast they are."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ringattn import Documents, Layout, Mask, MeshShape
from ringattn.commands import _workload
from ringattn.commands._text import note
from ringattn.parallel.machine.machine import call_seconds
from ringattn.parallel.planning.all_ranks import plan_group
from ringattn.parallel.pricing.setting import PriceInputs
from ringattn.parallel.simulation.simulate import Scenario, simulate
from ringattn.parallel.simulation.spans import PASSES
from ringattn.settings import AttentionOptions
from ringattn.training.packs.grouping import fill
from ringattn.training.packs.packing import Segment


@dataclass(frozen=True)
class Played:
    """The attention of one pack on its GPUs, played through; by pass where there is one of each.

    Arguments:
        area: allowed pairs of queries and keys.
        ideal: seconds of the same kernels on an even share of the work, without any communication.
    """

    gpus: int
    mesh: str
    schedule: dict[str, str]
    area: int
    seconds: dict[str, float]
    ideal: dict[str, float]


def point(args: argparse.Namespace, gpus: int, tokens_per_gpu: int) -> dict[str, Any]:
    """All packs of one number of GPUs: means of their times."""
    note(f"{gpus} GPUs with {tokens_per_gpu} tokens each")
    began = time.perf_counter()
    seeds = range(args.seed, args.seed + (args.packs or 1))
    packs = [_workload.lengths(args, gpus * tokens_per_gpu, seed) for seed in seeds]
    done = [attention(args, lengths, gpus) for lengths in packs]
    return {
        "gpus": gpus,
        "tokens_per_gpu": tokens_per_gpu,
        "packs": len(packs),
        "documents": sum(map(len, packs)) / len(packs),
        **summary(args, done),
        "host_seconds": time.perf_counter() - began,
    }


def grouped_point(args: argparse.Namespace, tokens_per_gpu: int) -> dict[str, Any]:
    """One step of several sequence groups of any sizes: it lasts as long as its slowest group."""
    began = time.perf_counter()
    gpus, mask = sum(args.groups), _workload.mask(args)
    lengths = [size for size in _workload.lengths(args, gpus * tokens_per_gpu, args.seed) if size]
    segments = [Segment(number, 0, size, True) for number, size in enumerate(lengths)]
    sizes = [group * tokens_per_gpu for group in args.groups]
    packs = fill(segments, sizes, lambda size: mask.band.area(0, size, size))
    parts = [[segment.stop - segment.start for segment in pack] for pack in packs]
    done = [attention(args, part, group) for part, group in zip(parts, args.groups, strict=True)]
    return {
        "gpus": gpus,
        "tokens_per_gpu": tokens_per_gpu,
        "packs": len(packs),
        "documents": len(lengths),
        **summary(args, [side_by_side(done)]),
        "groups": [{"gpus": one.gpus, **one.seconds} for one in done],
        "host_seconds": time.perf_counter() - began,
    }


def attention(args: argparse.Namespace, lengths: list[int], gpus: int) -> Played:
    """Both passes of one pack."""
    ulysses = largest_divisor(gpus, min(args.ulysses, args.heads[0]))
    mask = _workload.mask(args)
    layout = Layout(Documents(lengths), _workload.mesh(args, gpus // ulysses, ulysses), args.policy, mask)
    (placement,) = layout.parts
    setting = _workload.setting(args, placement)
    plans, slower = plan_group(placement, setting.shape, AttentionOptions(mask)), scenario(args, gpus)
    passes = {
        name: simulate(setting.machine, plans, setting.shape, backward, slower) for name, backward in PASSES.items()
    }
    return Played(
        gpus=gpus,
        mesh=f"{gpus // ulysses}×{ulysses}",
        schedule={name: plans[0].for_pass(backward).schedule_name for name, backward in PASSES.items()},
        area=sum(mask.band.area(0, size, size) for size in layout.docs.chunked(mask.chunk).lengths),
        seconds={name: one.seconds for name, one in passes.items()},
        ideal={name: ideal_seconds(setting, layout.docs, mask, backward) / gpus for name, backward in PASSES.items()},
    )


def side_by_side(groups: Sequence[Played]) -> Played:
    """Groups that compute at the same time, as one."""
    gpus = sum(one.gpus for one in groups)
    return Played(
        gpus=gpus,
        mesh="+".join(str(one.gpus) for one in groups),
        schedule={name: f"{len(groups)} groups" for name in PASSES},
        area=sum(one.area for one in groups),
        seconds={name: max(one.seconds[name] for one in groups) for name in PASSES},
        ideal={name: sum(one.ideal[name] * one.gpus for one in groups) / gpus for name in PASSES},
    )


def ideal_seconds(setting: PriceInputs, documents: Documents, mask: Mask, backward: bool) -> float:
    """The kernels of the whole pack on one GPU: what no number of GPUs can share better than evenly."""
    (whole,) = Layout(documents, MeshShape(), mask=mask).parts
    (plan,) = plan_group(whole, setting.shape, AttentionOptions(mask), setting.machine)
    return sum(call_seconds(setting.machine, call, setting.shape, backward) for call in plan.stages[0].calls)


def scenario(args: argparse.Namespace, gpus: int) -> Scenario:
    """What is slower than the machine says. Raises ValueError for ranks that are not there."""
    for name, slow in (("--straggler", args.straggler), ("--slow-link", args.slow_link)):
        if slow is not None and slow[0] >= gpus:
            raise ValueError(f"{name} names rank {slow[0]}, and there are {gpus} GPUs")
    ranks = {} if args.straggler is None else {args.straggler[0]: args.straggler[1]}
    links = {} if args.slow_link is None else {args.slow_link[:2]: args.slow_link[2]}
    return Scenario(ranks, links)


def summary(args: argparse.Namespace, done: Sequence[Played]) -> dict[str, Any]:
    """Of all packs of a point: mean seconds, TFLOP/s per GPU by mask area (backward 2.5 × forward), and efficiency."""
    mean = {name: sum(one.seconds[name] for one in done) / len(done) for name in PASSES}
    ideal = {name: sum(one.ideal[name] for one in done) / len(done) for name in PASSES}
    area = sum(one.area for one in done) / len(done)
    flops = 4 * args.heads[0] * args.head_dim * area / done[0].gpus
    both = sum(mean.values())
    return {
        "seconds": mean,
        "tflops": {"forward": flops / mean["forward"] / 1e12, "both": 3.5 * flops / both / 1e12},
        "efficiency": {**{name: ideal[name] / mean[name] for name in PASSES}, "both": sum(ideal.values()) / both},
        "schedule": done[0].schedule,
        "mesh": done[0].mesh,
    }


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return next(size for size in range(most, 0, -1) if number % size == 0)
