"""How attention scales: packs of documents on 8 to 1,024 GPUs, every rank's plan played through.

A discrete-event simulation of the plans that the executor runs, over nodes of 8 GPUs (--machine
says what a node is): kernels, ports and process groups of all ranks, who waits for whom. Efficiency
is against the same kernels on an even share of the work without any communication. Nothing is
measured here; the rates are those of --machine.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

from ringattn.commands import _workload
from ringattn.commands._call import HEADS, RANKS, integer, ranks
from ringattn.commands._call import tokens as token_count
from ringattn.commands._files import check_target, file
from ringattn.commands._text import note, row, table

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
PACKS = 1000
SLOWEST = 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=numbers(ranks), metavar="N,N", help="default 8,16,...,1024")
    parser.add_argument(
        "--tokens-per-gpu",
        type=numbers(token_count),
        default=(32768,),
        metavar="N,N",
        help="of the packed stream, default 32768",
    )
    parser.add_argument(
        "--ulysses", type=integer(HEADS), default=8, metavar="U", help="at most, default 8; the rest is ring"
    )
    parser.add_argument("--packs", type=integer(PACKS), metavar="N", help="packs of a histogram, default 1")
    parser.add_argument(
        "--groups",
        type=numbers(ranks),
        metavar="N,N",
        help="instead of --gpus: sequence groups of these sizes share the documents of a step by their cost",
    )
    parser.add_argument("--straggler", type=slow_rank, metavar="RANK:FACTOR", help="a rank whose kernels are slower")
    parser.add_argument(
        "--slow-link", type=slow_link, metavar="RANK:node|network:FACTOR", help="a rank whose port is slower"
    )
    _workload.add_workload_arguments(parser)
    parser.add_argument(
        "--draw",
        type=file,
        metavar="FILE",
        help="write efficiency against GPUs: .png or .svg; missing folders are made",
    )
    parser.add_argument("--json", action="store_true", help="the table as one JSON object")


def run(args: argparse.Namespace) -> int:
    from ringattn.drawing import check_drawing, draw_scaling

    try:
        if args.draw is not None:
            check_drawing(str(args.draw))
            check_target("--draw", args.draw)
        report = examine(args)
    except ValueError as error:
        args.parser.error(str(error))
    print(json.dumps(report, indent=2) if args.json else render(report))
    if args.draw is not None:
        curves: dict[str, list[tuple[int, float]]] = {}
        for point in report["points"]:
            label = f"{point['tokens_per_gpu']:,} tokens per GPU"
            curves.setdefault(label, []).append((point["gpus"], point["efficiency"]["both"]))
        draw_scaling(
            curves, f"{report['documents']}, heads {report['heads']}, {report['machine']['name']}", str(args.draw)
        )
    return 0


def examine(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the report says, as plain values; times in seconds."""
    machine = _workload.machine(args)
    check(args)
    if args.groups is None:
        points = [point(args, gpus, tokens) for tokens in args.tokens_per_gpu for gpus in args.gpus or GPUS]
    else:
        points = [grouped_point(args, tokens) for tokens in args.tokens_per_gpu]
    return {
        "documents": args.histogram or (str(args.lengths) if args.lengths is not None else "one document"),
        "heads": f"{args.heads[0]}/{args.heads[1]}",
        "head_dim": args.head_dim,
        "machine": {"name": machine.name, "gpus_per_node": machine.gpus_per_node, **machine.provenance},
        "links": {
            "/".join(key): {"latency": link.latency, "bandwidth": link.bandwidth} for key, link in machine.links.items()
        },
        "scenario": {"straggler": args.straggler, "slow_link": args.slow_link},
        "points": points,
    }


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that would say nothing, or two things."""
    if args.packs is not None and args.histogram is None:
        raise ValueError(f"--packs {args.packs} draws documents several times: it needs --histogram")
    if args.groups is None:
        return
    if sum(args.groups) > RANKS:
        raise ValueError(f"--groups must have at most {RANKS} GPUs together, got {sum(args.groups)}")
    for name in ("gpus", "packs", "straggler", "slow_link"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} is of one sequence group, and --groups has several sizes of them"
            )


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
        **summary(args, done, gpus),
        "schedule": done[0]["schedule"],
        "mesh": done[0]["mesh"],
        "host_seconds": time.perf_counter() - began,
    }


def grouped_point(args: argparse.Namespace, tokens_per_gpu: int) -> dict[str, Any]:
    """One step of several sequence groups of any sizes: it lasts as long as its slowest group."""
    from ringattn.training.grouping import fill
    from ringattn.training.packing import Segment

    began = time.perf_counter()
    gpus, mask = sum(args.groups), _workload.mask(args)
    lengths = [size for size in _workload.lengths(args, gpus * tokens_per_gpu, args.seed) if size]
    segments = [Segment(number, 0, size, True) for number, size in enumerate(lengths)]
    sizes = [group * tokens_per_gpu for group in args.groups]
    packs = fill(segments, sizes, lambda size: mask.band.area(0, size, size))
    parts = [[segment.stop - segment.start for segment in pack] for pack in packs]
    done = [attention(args, part, group) for part, group in zip(parts, args.groups, strict=True)]
    for one, group in zip(done, args.groups, strict=True):
        one["gpus"] = group
    together = {
        name: {
            "seconds": max(one[name]["seconds"] for one in done),
            "ceiling": sum(one[name]["ceiling"] * one["gpus"] for one in done) / gpus,
        }
        for name in ("forward", "backward")
    }
    together["area"] = sum(one["area"] for one in done)
    return {
        "gpus": gpus,
        "tokens_per_gpu": tokens_per_gpu,
        "packs": len(packs),
        "documents": len(lengths),
        **summary(args, [together], gpus),
        "schedule": {name: f"{len(done)} groups" for name in ("forward", "backward")},
        "mesh": "+".join(map(str, args.groups)),
        "groups": [
            {"gpus": one["gpus"], **{name: one[name]["seconds"] for name in ("forward", "backward")}} for one in done
        ],
        "host_seconds": time.perf_counter() - began,
    }


def attention(args: argparse.Namespace, lengths: list[int], gpus: int) -> dict[str, Any]:
    """One attention of one pack: simulated and ideal seconds of both passes."""
    from ringattn import Documents, Layout
    from ringattn.commands.plan import schedule_of
    from ringattn.parallel.planning.all_ranks import plan_group
    from ringattn.parallel.simulation.simulate import simulate

    ulysses = largest_divisor(gpus, min(args.ulysses, args.heads[0]))
    mask = _workload.mask(args)
    layout = Layout(Documents(lengths), _workload.mesh(args, gpus // ulysses, ulysses), args.policy, mask)
    (placement,) = layout.parts
    setting = _workload.setting(args, placement)
    plans = plan_group(placement, mask, setting)
    out: dict[str, Any] = {
        "mesh": f"{gpus // ulysses}×{ulysses}",
        "area": sum(mask.band.area(0, size, size) for size in layout.docs.chunked(mask.chunk).lengths),
        "schedule": {name: schedule_of(plans[0], name == "backward") for name in ("forward", "backward")},
    }
    for name in ("forward", "backward"):
        done = simulate(setting.machine, plans, setting.shape, name == "backward", scenario(args, gpus))
        ceiling = ideal_seconds(setting, layout.docs, mask, name == "backward") / gpus
        out[name] = {"seconds": done.seconds, "ceiling": ceiling}
    return out


def ideal_seconds(setting: Any, documents: Any, mask: Any, backward: bool) -> float:
    """The kernels of the whole pack on one GPU: what no number of GPUs can share better than evenly."""
    from ringattn import Layout, MeshShape
    from ringattn.parallel.machine.machine import call_seconds
    from ringattn.parallel.planning.all_ranks import plan_group

    (whole,) = Layout(documents, MeshShape(), mask=mask).parts
    (plan,) = plan_group(whole, mask, setting.on(whole))
    return sum(call_seconds(setting.machine, call, setting.shape, backward) for call in plan.stages[0].calls)


def scenario(args: argparse.Namespace, gpus: int) -> Any:
    from ringattn.parallel.simulation.simulate import Scenario

    for name, slow in (("--straggler", args.straggler), ("--slow-link", args.slow_link)):
        if slow is not None and slow[0] >= gpus:
            raise ValueError(f"{name} names rank {slow[0]}, and there are {gpus} GPUs")
    ranks = {} if args.straggler is None else {args.straggler[0]: args.straggler[1]}
    links = {} if args.slow_link is None else {args.slow_link[:2]: args.slow_link[2]}
    return Scenario(ranks, links)


def summary(args: argparse.Namespace, done: list[dict[str, Any]], gpus: int) -> dict[str, Any]:
    """Mean seconds, TFLOP/s per GPU by mask area (backward 2.5 × forward), and efficiency."""
    names = ("forward", "backward")
    mean = {name: sum(one[name]["seconds"] for one in done) / len(done) for name in names}
    ceiling = {name: sum(one[name]["ceiling"] for one in done) / len(done) for name in names}
    area = sum(one["area"] for one in done) / len(done)
    flops = 4 * args.heads[0] * args.head_dim * area / gpus
    both = sum(mean.values())
    return {
        "seconds": mean,
        "tflops": {"forward": flops / mean["forward"] / 1e12, "both": 3.5 * flops / both / 1e12},
        "efficiency": {**{name: ceiling[name] / mean[name] for name in names}, "both": sum(ceiling.values()) / both},
    }


def render(report: dict[str, Any]) -> str:
    """The report for people."""
    machine = report["machine"]
    lines = [
        f"{report['documents']}, heads {report['heads']}, head dim {report['head_dim']}; simulated for "
        f"{machine['name']} ({machine.get('origin', 'unknown')}), nodes of {machine['gpus_per_node']}"
    ]
    slow = [f"{name.replace('_', ' ')} {value}" for name, value in report["scenario"].items() if value is not None]
    lines += row("with", ", ".join(slow)) if slow else []
    rows = [
        ["GPUs", "tokens/GPU", "mesh", "documents", "forward ms", "backward ms", "TFLOP/s/GPU", "efficiency", "host s"]
    ]
    for one in report["points"]:
        efficiency = one["efficiency"]
        rows.append(
            [
                str(one["gpus"]),
                str(one["tokens_per_gpu"]),
                one["mesh"],
                f"{one['documents']:.0f}",
                *(f"{one['seconds'][name] * 1e3:.2f}" for name in ("forward", "backward")),
                f"{one['tflops']['both']:.0f}",
                f"{efficiency['forward']:.3f}/{efficiency['both']:.3f}",
                f"{one['host_seconds']:.1f}",
            ]
        )
    lines += ["", *table(rows), "  efficiency: forward / forward and backward"]
    for one in report["points"]:
        for group in one.get("groups", []):
            times = ", ".join(f"{name} {group[name] * 1e3:.2f} ms" for name in ("forward", "backward"))
            lines += row(f"group of {group['gpus']}", times)
    return "\n".join(lines)


def numbers(parse: Callable[[str], int]) -> Callable[[str], tuple[int, ...]]:
    """The type of an option with several of them."""
    return lambda text: tuple(parse(part) for part in text.split(","))


def slow_rank(text: str) -> tuple[int, float]:
    rank, _, factor = text.partition(":")
    return _rank(rank, text), _factor(factor, text)


def slow_link(text: str) -> tuple[int, str, float]:
    parts = text.split(":")
    if len(parts) != 3 or parts[1] not in ("node", "network"):
        raise argparse.ArgumentTypeError(f"expected RANK:node:FACTOR or RANK:network:FACTOR, got {text!r}")
    return _rank(parts[0], text), parts[1], _factor(parts[2], text)


def _rank(part: str, text: str) -> int:
    if not part.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a rank >= 0 first, got {text!r}")
    return int(part)


def _factor(part: str, text: str) -> float:
    try:
        factor = float(part)
    except ValueError:
        factor = 0.0
    if not 1 <= factor <= SLOWEST:
        raise argparse.ArgumentTypeError(f"expected a factor from 1 to {SLOWEST:g} last, got {text!r}")
    return factor


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return next(size for size in range(most, 0, -1) if number % size == 0)
