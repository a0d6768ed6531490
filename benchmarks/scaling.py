"""Simulated weak scaling, 8 to 1,024 GPUs: python benchmarks/scaling.py --out benchmarks/results/scaling-h200.md

Writes a table and, beside it, a plot (.png). Nothing is measured: it runs `ringattn simulate` for one document and for
histogram packs, two head counts, and two scenarios. Last comes what the simulator says of eight GPUs on workloads that
were measured there with plain Ulysses, which is its only check against hardware so far.
"""

import argparse
import time
from datetime import date
from pathlib import Path
from typing import Any

from ringattn import Documents, Layout, MeshShape
from ringattn.cli import make_parser
from ringattn.commands.simulate import examine
from ringattn.drawing import draw_scaling
from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.all_ranks import plan_group
from ringattn.parallel.simulation.simulate import simulate
from ringattn.workloads import HISTOGRAMS

WORKLOADS = {"one document": [], "histogram packs": ["--histogram", "chatqa", "--packs", "3"]}
HEADS = ("32/8", "64/8")
SCENARIOS = {
    "none": [],
    "one GPU computes 10 % slower": ["--straggler", "{rank}:1.1"],
    "one GPU's network port at half rate": ["--slow-link", "{rank}:network:2"],
    "one GPU's NVLink port at half rate": ["--slow-link", "{rank}:node:2"],
}
# TFLOP/s per GPU, forward and forward + backward, of plain Ulysses over NCCL with FlashAttention 3 on 8 H200s
# (NVSwitch), 32 query and 8 key heads of 128: one run each, slowest rank, median of 5.
MEASURED = {
    "DENSE64K": ([65536], 600, 566),
    "DENSE256K": ([262144], 640, 601),
    "SHORT256K": ([4096] * 32 + [8192] * 8 + [16384] * 4, 358, 411),
    "HIST256K": (None, 493, 472),
    "HIST64K": (None, 105, 153),
}


def points(*argv: str) -> list[dict[str, Any]]:
    args = make_parser().parse_args(["simulate", "--machine", "H200", *argv])
    return examine(args)["points"]


def scaling_rows() -> tuple[list[str], dict[str, list[tuple[int, float]]]]:
    rows, curves = [], {}
    for workload, argv in WORKLOADS.items():
        for heads in HEADS:
            for point in points("--heads", heads, *argv):
                curves.setdefault(f"{workload}, {heads} heads", []).append((point["gpus"], point["efficiency"]["both"]))
                efficiency, schedule = point["efficiency"], point["schedule"]
                times = [point["seconds"][name] * 1e3 for name in ("forward", "backward")]
                rows.append(
                    f"| {workload} | {heads} | {point['gpus']} | {point['mesh']} "
                    f"| {schedule['forward']} / {schedule['backward']} | {times[0]:.2f} / {times[1]:.2f} "
                    f"| {point['tflops']['forward']:.0f} / {point['tflops']['both']:.0f} "
                    f"| {efficiency['forward']:.3f} / {efficiency['both']:.3f} | {point['host_seconds']:.1f} |"
                )
    return rows, curves


def scenario_rows() -> list[str]:
    rows = []
    for workload, argv in WORKLOADS.items():
        for name, slow in SCENARIOS.items():
            found = [
                *points("--gpus", "64", *argv, *(word.format(rank=63) for word in slow)),
                *points("--gpus", "1024", *argv, *(word.format(rank=1023) for word in slow)),
            ]
            both = " | ".join(
                f"{point['efficiency']['forward']:.3f} / {point['efficiency']['both']:.3f}" for point in found
            )
            rows.append(f"| {workload} | {name} | {both} |")
    return rows


def check_rows() -> list[str]:
    """Plain Ulysses on 8 GPUs: simulated beside measured."""
    rows, machine, shape = [], SHIPPED["H200"], Shape(32, 8, 128, 128)
    for name, (lengths, *measured) in MEASURED.items():
        tokens = 65536 if name.endswith("64K") else 262144
        packs = (
            [lengths] if lengths else [HISTOGRAMS["chatqa"].pack(tokens, seed, tokens // 4) for seed in (3, 4, 5, 6)]
        )
        flops, times = 0.0, [0.0, 0.0]
        for pack in packs:
            (layout,) = Layout(Documents(pack), MeshShape(1, 1, 8, machine=machine)).parts
            plans = plan_group(layout, shape, machine=machine)
            flops += 4 * 32 * 128 * sum(n * (n + 1) // 2 for n in pack) / 8
            times = [t + simulate(machine, plans, shape, bool(n)).seconds for n, t in enumerate(times)]
        found = flops / times[0] / 1e12, 3.5 * flops / sum(times) / 1e12
        share = " / ".join(f"{a / b - 1:+.0%}" for a, b in zip(found, measured, strict=True))
        rows.append(f"| {name} | {measured[0]} / {measured[1]} | {found[0]:.0f} / {found[1]:.0f} | {share} |")
    return rows


def assumptions() -> list[str]:
    machine = SHIPPED["H200"]
    lines = [f"- Machine `{machine.name}`, {machine.provenance['hardware']}: {machine.provenance['note']}."]
    for (link_class, primitive), link in sorted(machine.links.items()):
        if primitive != "copy":
            origin = "fitted to measurements on 8 H200s" if link_class == "node" else "assumed: 400 Gb/s at 90 %"
            lines.append(
                f"- {link_class}, {primitive}: {link.bandwidth / 1e9:.0f} GB/s a direction and GPU, "
                f"{link.latency * 1e6:.0f} µs a batch ({origin})."
            )
    for rate in machine.rates:
        if rate.head_dim == 128:
            name = "backward" if rate.backward else "forward"
            lines.append(
                f"- Kernel, head dim 128, {name}: {rate.flops / 1e12:.0f} TFLOP/s on full {rate.query_tile} × "
                f"{rate.key_tile} tiles, {rate.tile_seconds * 1e6:.0f} µs a tile, {rate.launch_seconds * 1e6:.0f} µs a "
                "call (fitted to measurements on an H200)."
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    began = time.perf_counter()
    rows, curves = scaling_rows()
    plot = out.with_suffix(".png")
    draw_scaling(curves, "Simulated weak scaling, 32K tokens per GPU, nodes of 8 H200", str(plot))
    text = [
        "# Simulated weak scaling of attention to 1,024 H200s, 32K tokens per GPU",
        "",
        f"{date.today()}, `python benchmarks/scaling.py --out {out}`, {{seconds:.0f}} s on one CPU core. **Simulated, "
        "not measured.**",
        "",
        f"![efficiency against GPUs]({plot.name})",
        "",
        "bfloat16, head dim 128, causal, one stream of GPUs × 32,768 tokens over all GPUs: ulysses 8 inside a node, "
        "ring across nodes, `auto` layout and schedule. Histogram packs: lengths of `ringattn.workloads` (`chatqa`), "
        "mean of 3. Efficiency: time of the same kernels on an even share of the pack without communication, over the "
        "simulated time; forward / forward + backward. TFLOP/s per GPU by mask area, backward 2.5 × forward. "
        "Host: planning and simulating both passes of all packs, beside other work on the machine.",
        "",
        "| workload | heads | GPUs | ring×ulysses | schedule f / b | ms f / b | TFLOP/s f / f+b | efficiency f / f+b | "
        "host s |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        "## Scenarios, 32/8 heads: efficiency f / f+b",
        "",
        "The slow GPU is the last one, whose ring position holds the longest documents.",
        "",
        "| workload | slow part | 64 GPUs | 1,024 GPUs |",
        "|---|---|---|---|",
        *scenario_rows(),
        "",
        "## Assumptions",
        "",
        *assumptions(),
        "- A port carries one message at a time, at its full rate; the switches between ports are never the limit. A "
        "message between different rails leaves through the port of the receiver's rail in the sender's node.",
        "- Transfers of one process group follow one another and begin when both ends have posted them. Kernels lose "
        f"{SHIPPED['H200'].links['node', 'p2p'].disturbance * 1e12:.1f} ps for each byte that travels beside them "
        "(fitted). Nothing varies from step to step.",
        "- Both passes begin at the same moment on all ranks.",
        "",
        "## Check: plain Ulysses on 8 H200s, TFLOP/s per GPU, f / f+b",
        "",
        "Measured with FlashAttention 3 and NCCL, one run each, outside of ringattn; histogram packs are other draws "
        "of the same histogram (simulated: sum over 4). HIST64K is where the machine's kernel rates are known to "
        "be too fast (see above), and where launches on the host, which are not simulated, bind.",
        "",
        "| workload | measured | simulated | difference |",
        "|---|---|---|---|",
        *check_rows(),
    ]
    page = "\n".join(text).replace("{seconds:.0f}", f"{time.perf_counter() - began:.0f}")
    out.write_text(page + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
