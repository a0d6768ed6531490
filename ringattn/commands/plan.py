"""What every rank would do for a batch of documents, what that costs, and why it is done so.

Without --lengths or --histogram it is one document. Times are predicted for --machine; forward and
backward are planned apart. --draw writes a picture: the mask with every rank's blocks in its
colour, and what each rank does when, as the simulator plays it through.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ringattn.commands import _workload
from ringattn.commands._call import HEADS, RANKS, TOKENS, integer, ranks, tokens
from ringattn.commands._files import check_target, file
from ringattn.commands._text import note, row, table
from ringattn.parallel.planning.options import scheme_names

SHOWN = 64  # ranks in the table; of more the slowest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=tokens, metavar="T", help="of the packed stream, e.g. 262144")
    parser.add_argument("--ring", type=ranks, default=1, metavar="R", help="ranks that pass keys, default 1")
    parser.add_argument("--ulysses", type=ranks, default=1, metavar="U", help="ranks that exchange heads, default 1")
    parser.add_argument("--sequence", type=ranks, metavar="N", help="ranks, in place of the two: degrees are chosen")
    parser.add_argument("--scheme", choices=scheme_names(), default="auto", help="default auto")
    parser.add_argument("--stages", type=ranks, metavar="N", help="of --scheme ring, the local one included")
    parser.add_argument("--memory", type=integer(TOKENS), metavar="MIB", help="what a rank's buffers may take")
    parser.add_argument(
        "--head-chunks",
        type=integer(HEADS),
        metavar="N",
        help="of heads, computed one after another in buffers of one; default: 1, or the fastest that keep --memory",
    )
    _workload.add_workload_arguments(parser)
    parser.add_argument(
        "--draw", type=file, metavar="FILE", help="write a picture: .png or .svg; missing folders are made"
    )
    parser.add_argument("--json", action="store_true", help="the table as one JSON object")


def run(args: argparse.Namespace) -> int:
    from ringattn.drawing import check_drawing

    try:
        if args.draw is not None:
            check_drawing(str(args.draw))
            check_target("--draw", args.draw)
        layout, parts = plan(args)
    except ValueError as error:
        args.parser.error(str(error))
    reports = [examine(planned) for planned in parts]
    if args.json:
        whole = {"reason": layout.reason, "parts": reports} if len(layout.parts) > 1 else reports[0]
        print(json.dumps(whole, indent=2))
    else:
        print("\n\n".join([*chosen_degrees(layout), *map(render, reports)]))
    for number, (planned, report) in enumerate(zip(parts, reports, strict=True), 1):
        if args.draw is not None:
            path: Path = args.draw
            draw(planned, report, str(path.with_stem(f"{path.stem}-{number}") if len(layout.parts) > 1 else path))
    return 0


def plan(args: argparse.Namespace) -> tuple[Any, list[dict[str, Any]]]:
    """The layout, and the objects that the report and the picture speak of: of each part, or of the whole."""
    from ringattn import Documents, Layout
    from ringattn.parallel.planning.all_ranks import plan_group
    from ringattn.parallel.planning.options import check_scheme
    from ringattn.parallel.planning.planner import part_groups, part_scheme
    from ringattn.parallel.pricing.memory import buffer_bytes

    documents = Documents(_workload.lengths(args, args.tokens, args.seed))
    mask = _workload.mask(args)
    if args.sequence is not None and (args.ring, args.ulysses) != (1, 1):
        raise ValueError(f"--sequence {args.sequence} leaves --ring and --ulysses to the documents")
    size = args.sequence or args.ring * args.ulysses
    if size > RANKS:
        raise ValueError(f"--ring × --ulysses must be at most {RANKS} ranks, got {size}")
    if size > SHOWN:
        note(f"{size} ranks are planned, priced on every mesh and played through: that takes a while")
    if args.sequence is None:
        layout = Layout(documents, _workload.mesh(args, args.ring, args.ulysses), args.policy, mask)
    else:
        shape = {"heads": args.heads, "head_dim": args.head_dim}
        layout = Layout(documents, _workload.free_mesh(args, args.sequence), args.policy, mask, **shape)
    check_scheme(args.scheme, layout.mesh, args.stages, len(layout.parts))
    left = None if args.memory is None else args.memory << 20
    planned = []
    for part in layout.parts:
        setting = _workload.setting(args, part)
        plans = plan_group(
            part,
            mask,
            setting,
            part_scheme(layout, part, args.scheme, left),
            args.stages,
            left,
            part_groups(layout),
            args.head_chunks,
        )
        setting = replace(setting, head_chunks=plans[0].head_chunks)
        planned.append(
            {"layout": part, "mask": mask, "setting": setting, "plans": plans, "memory_limit": left, "args": args}
        )
        left = None if left is None else left - max(buffer_bytes(plan, setting.shape) for plan in plans)
    return layout, planned


def chosen_degrees(layout: Any) -> list[str]:
    """Why these degrees, where the layout chose them."""
    if not layout.reason:
        return []
    lines = row("degrees", layout.reason)
    if len(layout.parts) > 1:
        lines += row("parts", "each is described by itself; what one waits for travels while another computes")
    return ["\n".join(lines)]


def examine(planned: dict[str, Any]) -> dict[str, Any]:
    """Everything that the report says, as plain values; times in seconds."""
    from ringattn.parallel.simulation.simulate import simulate

    layout, setting, plans = planned["layout"], planned["setting"], planned["plans"]
    mesh, shape, machine = layout.mesh, setting.shape, setting.machine
    passes = {name: simulate(machine, plans, shape, name == "backward") for name in ("forward", "backward")}
    planned["passes"] = passes
    ranks = [rank_report(planned, rank) for rank in range(len(plans))]
    area = [rank["area"] for rank in ranks]
    gathered = sum(layout.position_sizes) * (mesh.ring - 1)
    received = sum(plan.received_rows for plan in plans[:: mesh.ulysses])
    return {
        "documents": {
            "count": len(layout.docs),
            "tokens": sum(layout.position_sizes),
            "longest": max(layout.docs.lengths, default=0),
        },
        "mesh": {"ring": mesh.ring, "ulysses": mesh.ulysses},
        "heads": [shape.query_heads, shape.key_heads],
        "head_dim": shape.head_dim,
        "machine": {"name": machine.name, **machine.provenance},
        "policy": layout.policy,
        "schedule": {name: schedule_of(plans[0], name == "backward") for name in passes},
        "reason": plans[0].reason,
        "seconds": {name: one.seconds for name, one in passes.items()},
        "balance": max(area) * len(area) / sum(area) if sum(area) else 1.0,
        "received_share": received / gathered if gathered else 0.0,
        "alternatives": alternatives(planned),
        "meshes": meshes(planned),
        "ranks": ranks,
    }


def schedule_of(plan: Any, backward: bool) -> str:
    walked = plan.backward if backward and plan.backward is not None else plan
    if walked.schedule == "ring":
        return f"ring of {len(walked.stages)} stages"
    return str(walked.schedule)


def rank_report(planned: dict[str, Any], rank: int) -> dict[str, Any]:
    """One rank: what it holds, computes, sends and receives (forward), and its predicted seconds."""
    from ringattn.parallel.geometry.block_table import BlockTable
    from ringattn.parallel.pricing.plan_cost import rank_cost
    from ringattn.parallel.simulation.traffic import Traffic

    setting, layout, plan = planned["setting"], planned["layout"], planned["plans"][rank]
    if "traffic" not in planned:
        planned["traffic"] = received_and_sent(Traffic(planned["plans"], setting.shape, False))
    received, sent = planned["traffic"]
    pairs = sum(int(BlockTable.of(stage.calls).areas.sum()) for stage in plan.stages)
    cost = rank_cost(setting.machine, plan, setting.shape)
    return {
        "rank": rank,
        "tokens": layout.tokens(rank),
        "area": pairs * setting.shape.share(plan.exchange).query_heads / setting.shape.query_heads,
        "received_bytes": received[rank],
        "sent_bytes": sent[rank],
        "stages": len(plan.stages),
        "head_chunks": plan.head_chunks,
        "buffer_bytes": int(cost.buffer_bytes),
        **{
            name: {
                "compute": one.compute,
                "wire": one.wire,
                "exposed": one.exposed,
                "simulated": planned["passes"][name].ends[rank],
            }
            for name, one in (("forward", cost.forward), ("backward", cost.backward))
        },
    }


def received_and_sent(traffic: Any) -> tuple[list[float], list[float]]:
    """Bytes of each rank over a pass."""
    ranks = len(traffic.plans)
    received, sent = [0.0] * ranks, [0.0] * ranks
    batches = [("exchange", 0), ("exchange", 1)] if traffic.ulysses > 1 else []
    batches += [("cast", number) for number in traffic.later()]
    for rank in range(ranks):
        for kind, stage in batches:
            for peer, size in traffic.sent(kind, stage, rank):
                sent[rank] += size
                received[peer] += size
    return received, sent


def alternatives(planned: dict[str, Any]) -> list[dict[str, Any]]:
    """Every schedule of this mesh with its predicted seconds and memory."""
    from ringattn.parallel.pricing.price import most_bytes
    from ringattn.parallel.pricing.pricer import Pricer
    from ringattn.parallel.schedules.candidates import candidates

    layout, mask, setting = planned["layout"], planned["mask"], planned["setting"]
    pricer = Pricer.of(layout, mask, setting)
    out = []
    for schedule in candidates(layout.mesh.ring, "auto", None):
        forward, backward = pricer.price(schedule)
        out.append(
            {
                "schedule": schedule.name,
                "forward": forward.seconds,
                "backward": backward.seconds,
                "buffer_bytes": most_bytes((forward, backward)),
            }
        )
    return out


def meshes(planned: dict[str, Any]) -> list[dict[str, Any]]:
    """The best schedules of every ring × ulysses with as many ranks, heads and memory permitting."""
    from ringattn.parallel.placement.placement import Placement
    from ringattn.parallel.planning.planner import chosen
    from ringattn.parallel.schedules.candidates import candidates

    args, layout, mask, setting = planned["args"], planned["layout"], planned["mask"], planned["setting"]
    ranks, node = layout.mesh.sequence_size, setting.machine.gpus_per_node
    out = []
    for ulysses in [size for size in range(1, ranks + 1) if ranks % size == 0]:
        if ulysses > setting.shape.query_heads or ulysses > node > 1:
            continue
        mesh = _workload.mesh(args, ranks // ulysses, ulysses)
        other = Placement(layout.docs, mesh, args.policy, ((mask, 1.0),), tokens=layout.placed)
        options = candidates(other.mesh.ring, "auto", None)
        try:
            _, choice = chosen(
                other, mask, _workload.setting(args, other), options, planned["memory_limit"], args.head_chunks
            )
        except ValueError:  # the memory limit
            continue
        cost = choice.cost
        out.append(
            {
                "ring": other.mesh.ring,
                "ulysses": ulysses,
                "forward": cost.forward.seconds,
                "backward": cost.backward.seconds,
            }
        )
    return out


def render(report: dict[str, Any]) -> str:
    """The report for people."""
    documents, mesh, machine = report["documents"], report["mesh"], report["machine"]
    heads = "/".join(map(str, report["heads"]))
    lines = [
        f"{documents['count']} documents, {documents['tokens']} tokens (longest {documents['longest']}); "
        f"heads {heads}, head dim {report['head_dim']}",
        f"ring {mesh['ring']} × ulysses {mesh['ulysses']}, {report['policy']} layout; predicted for {machine['name']} "
        f"({machine.get('origin', 'unknown')})",
        "",
    ]
    lines += rank_table(report)
    seconds = report["seconds"]
    together = (
        f"forward {milliseconds(seconds['forward'])} ms, backward {milliseconds(seconds['backward'])} ms; area "
        f"max/mean {report['balance']:.3f}; {report['received_share']:.1%} of an all-gather of the keys is received"
    )
    lines += [
        "",
        "All ranks together, simulated",
        *row("", together, ""),
        "",
        f"Schedule: {report['schedule']['forward']} forward, {report['schedule']['backward']} backward",
    ]
    lines += row("why", report["reason"])
    lines += ["", *alternative_table(report)]
    return "\n".join(lines)


def rank_table(report: dict[str, Any]) -> list[str]:
    ranks = report["ranks"]
    shown = ranks
    if len(ranks) > SHOWN:
        shown = sorted(ranks, key=lambda rank: -rank["forward"]["simulated"] - rank["backward"]["simulated"])[:SHOWN]
    head = ["rank", "tokens", "Mpairs", "recv MiB", "sent MiB", "stages"]
    head += ["compute", "wire", "exposed", "compute", "wire", "exposed"]
    body = []
    for rank in shown:
        times = [rank[name][part] for name in ("forward", "backward") for part in ("compute", "wire", "exposed")]
        sizes = [f"{rank[name] / 2**20:.1f}" for name in ("received_bytes", "sent_bytes")]
        body.append(
            [str(rank["rank"]), str(rank["tokens"]), f"{rank['area'] / 1e6:.1f}", *sizes, str(rank["stages"])]
            + [milliseconds(time) for time in times]
        )
    lines = table([head, *body])
    first = lines[0].index("compute")
    second = lines[0].rindex("compute")
    lines.insert(0, " " * first + "forward ms".ljust(second - first) + "backward ms")
    if len(ranks) > SHOWN:
        lines.append(f"  the {SHOWN} slowest of {len(ranks)} ranks; --json has all")
    return lines


def alternative_table(report: dict[str, Any]) -> list[str]:
    """What else could be done: other schedules on this mesh, other meshes of as many ranks."""
    rows = [["on this mesh", "forward ms", "backward ms", "buffers MiB"]]
    for one in report["alternatives"]:
        marks = [name for name in ("forward", "backward") if report["schedule"][name] == one["schedule"]]
        times = [milliseconds(one[name]) + ("*" if name in marks else " ") for name in ("forward", "backward")]
        rows.append([one["schedule"], *times, f"{one['buffer_bytes'] / 2**20:.0f}"])
    lines = [*table(rows, left=1), "  * chosen"]
    if len(report["meshes"]) > 1:
        rows = [["other meshes, best schedules", "forward ms", "backward ms"]]
        for one in report["meshes"]:
            times = [milliseconds(one[name]) for name in ("forward", "backward")]
            rows.append([f"ring {one['ring']} × ulysses {one['ulysses']}", *times])
        lines += ["", *table(rows, left=1)]
    return lines


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def draw(planned: dict[str, Any], report: dict[str, Any], path: str) -> None:
    from ringattn.drawing import draw_plan

    documents, mesh = report["documents"], report["mesh"]
    title = (
        f"{documents['count']} document{'s' * (documents['count'] != 1)}, {documents['tokens']:,} tokens on ring "
        f"{mesh['ring']} × ulysses {mesh['ulysses']}, {report['policy']} layout"
    )
    draw_plan(planned["plans"], planned["layout"].docs.total, planned["passes"], report["schedule"], title, path)
