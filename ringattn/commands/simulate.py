"""How attention scales: packs of documents on 8 to 1,024 GPUs, every rank's plan played through.

A discrete-event simulation of the plans that the executor runs, over nodes of 8 GPUs (--machine
says what a node is): kernels, ports and process groups of all ranks, who waits for whom. Efficiency
is against the same kernels on an even share of the work without any communication. Nothing is
measured here; the rates are those of --machine.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

from ringattn.commands import _workload
from ringattn.commands._call import HEADS, RANKS, integer, ranks
from ringattn.commands._call import tokens as token_count
from ringattn.commands._files import check_target, file
from ringattn.commands._text import row, table

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
PACKS = 1000
SLOWEST = 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=numbers(ranks), metavar="N,N", help="numbers of GPUs, default 8,16,...,1024")
    parser.add_argument(
        "--tokens-per-gpu",
        type=numbers(token_count),
        default=(32768,),
        metavar="N,N",
        help="tokens of the packed stream for each GPU, default 32768",
    )
    parser.add_argument(
        "--ulysses",
        type=integer(HEADS),
        default=8,
        metavar="U",
        help="ranks that exchange heads, at most, default 8; the rest is the ring",
    )
    parser.add_argument("--packs", type=integer(PACKS), metavar="N", help="packs to draw from the histogram, default 1")
    parser.add_argument(
        "--groups",
        type=numbers(ranks),
        metavar="N,N",
        help="instead of --gpus: sequence groups of these sizes share the documents of a step by their cost",
    )
    parser.add_argument(
        "--straggler", type=slow_rank, metavar="RANK:FACTOR", help="a rank whose kernels take FACTOR times as long"
    )
    parser.add_argument(
        "--slow-link",
        type=slow_link,
        metavar="RANK:node|network:FACTOR",
        help="a rank whose port takes FACTOR times as long",
    )
    _workload.add_workload_arguments(parser)
    parser.add_argument(
        "--draw",
        type=file,
        metavar="FILE",
        help="write a picture of efficiency against GPUs: .png or .svg; missing folders are made",
    )
    parser.add_argument("--json", action="store_true", help="print the table as one JSON object")


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
    from ringattn.commands._scaling import grouped_point, point

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
