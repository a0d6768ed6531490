"""What `ringattn plan` says of a layer that carries a state: its pieces, and what both routes take."""

import argparse
from typing import TYPE_CHECKING, Any

from ringattn.commands._call import head_dim, heads
from ringattn.commands._text import row, table

if TYPE_CHECKING:
    from ringattn import Layout, Mask
    from ringattn.parallel.simulation.spans import Pass
    from ringattn.recurrent.price import RecurrenceShape
    from ringattn.recurrent.weighing import MixingLayers

# Delta rule, decays by key dim.
RULES = {
    "delta": (True, False),
    "kimi": (True, True),
    "mamba2": (False, False),
    "lightning": (False, False),
    "linear": (False, True),
}
SHOWN = 64
PASSES = ("forward", "backward")


def add_state_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a layer that carries a state, beside the attention")
    group.add_argument(
        "--recurrent",
        choices=sorted(RULES),
        help="one of these too: gated delta rule, Kimi's delta attention, Mamba-2, lightning or gated linear attention",
    )
    group.add_argument(
        "--recurrent-heads", type=heads, default=(32, 16), metavar="H/K", help="value and key heads, default 32/16"
    )
    group.add_argument(
        "--recurrent-dim", type=head_dim, default=128, metavar="D", help="dims of keys and of values, default 128"
    )


def layers_of(args: argparse.Namespace, mask: "Mask") -> "MixingLayers | None":
    """What the layout weighs; None without such a layer."""
    from ringattn.recurrent.weighing import MixingLayers

    if args.recurrent is None:
        return None
    return MixingLayers(((mask, 1),), ((_shape(args), args.recurrent_layers),), args.heads, args.head_dim)


def examine_states(args: argparse.Namespace, layout: "Layout") -> dict[str, Any] | None:
    """Pieces of every rank, and seconds and bytes of both routes; None if no such layer was asked for.

    Raises ValueError for dims below 1.
    """
    from ringattn.recurrent.plan import plan_recurrence
    from ringattn.recurrent.price import cheaper, prices
    from ringattn.recurrent.timeline import play

    if args.recurrent is None:
        return None
    H, K = args.recurrent_heads
    shape = _shape(args)
    routes = prices(layout, shape)
    plans = [plan_recurrence(layout, rank, routes[0].rounds) for rank in range(layout.mesh.sequence_size)]
    route = cheaper(routes)
    passes = play(layout, shape, route)
    return {
        "rule": args.recurrent,
        "heads": [H, K],
        "dim": args.recurrent_dim,
        "cut_documents": len(plans[0].chains),
        "route": route,
        "seconds": {name: one.seconds for name, one in passes.items()},
        "routes": {one.route: {"seconds": one.seconds, "sent_bytes": one.sent, "rounds": one.rounds} for one in routes},
        "ranks": [
            {
                "rank": plan.rank,
                "whole": len(plan.whole),
                "cut": len(plan.cut),
                "cut_tokens": sum(piece.size for piece in plan.cut),
                "composed": sum(len(step) for one in plan.ahead for step in one.steps),
                **{
                    name: {
                        "compute": one.busy("compute")[plan.rank],
                        "wire": one.busy("states")[plan.rank] + one.busy("exchange")[plan.rank],
                        "simulated": one.ends[plan.rank],
                    }
                    for name, one in passes.items()
                },
            }
            for plan in plans
        ],
    }


def passes_of_states(
    args: argparse.Namespace, layout: "Layout", route: str
) -> "tuple[dict[str, Pass], dict[str, str]]":
    """Both passes for the picture, by names of their own, and what is told of each."""
    from ringattn.recurrent.timeline import TOLD, play

    passes = play(layout, _shape(args), route)
    names = {name: f"{args.recurrent}, {name}" for name in passes}
    told = {names[name]: f"{route} ({TOLD[route, name]})" for name in passes}
    return {names[name]: one for name, one in passes.items()}, told


def _shape(args: argparse.Namespace) -> "RecurrenceShape":
    from ringattn.recurrent.price import RecurrenceShape

    (H, K), dim = args.recurrent_heads, args.recurrent_dim
    return RecurrenceShape(K, H, dim, dim, *RULES[args.recurrent])


def render_states(report: dict[str, Any]) -> str:
    """The report for people."""
    head = (
        f"Layer with a state: {report['rule']}, heads {report['heads'][0]}/{report['heads'][1]}, dim {report['dim']}; "
        f"{report['cut_documents']} documents are cut"
    )
    rows = [["rank", "whole documents", "cut pieces", "their tokens", "maps composed"]]
    rows[0] += ["compute", "wire", "end", "compute", "wire", "end"]
    for rank in report["ranks"][:SHOWN]:
        times = [rank[name][part] for name in PASSES for part in ("compute", "wire", "simulated")]
        counts = [str(rank[name]) for name in ("rank", "whole", "cut", "cut_tokens", "composed")]
        rows.append(counts + [f"{seconds * 1e3:.2f}" for seconds in times])
    ranks = table(rows)
    first, second = ranks[0].index("compute"), ranks[0].rindex("compute")
    lines = [head, "", " " * first + "forward ms".ljust(second - first) + "backward ms", *ranks]
    if len(report["ranks"]) > SHOWN:
        lines.append(f"  the first {SHOWN} of {len(report['ranks'])} ranks; --json has all")
    rows = [["route", "ms beside the kernel", "sent MiB", "rounds"]]
    for name, one in report["routes"].items():
        mark = "*" if name == report["route"] else " "
        rows.append([name, f"{one['seconds'] * 1e3:.2f}{mark}", f"{one['sent_bytes'] / 2**20:.1f}", str(one["rounds"])])
    lines += ["", *table(rows, left=1), "  * chosen"]
    seconds = " and ".join(f"{name} {report['seconds'][name] * 1e3:.2f} ms" for name in PASSES)
    lines += row("", f"one layer, all ranks together: {seconds}")
    return "\n".join(lines)
