"""Time to place and plan a pack, on the host.

    python benchmarks/planning.py --out benchmarks/results/planning.md

"plan" is what one rank does beside the layout: prices of all schedules for all ranks, and its own plans of both passes.
"open" is a mesh that leaves its degrees to the layout, `init_mesh(sequence=...)`, of nodes of 8 ranks: then the layout
prices all of them, and the plan is what is left.
"""

import argparse
import platform
import statistics
import time
from datetime import date
from random import Random

from ringattn import Documents, Layout, MeshShape
from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.planner import plan_parts

CASES = ((200, 8), (1000, 64), (10_000, 1024))


REPEATS = 5  # the best of them: others use this machine too


def milliseconds(lengths: list[int], ring: int, policy: str) -> tuple[float, float]:
    """Median over ranks of the time for the layout and for this rank's plan."""
    times = [_of_rank(lengths, ring, rank, policy) for rank in range(0, ring, max(1, ring // 9))]
    return statistics.median(a for a, _ in times) * 1e3, statistics.median(b for _, b in times) * 1e3


def _of_rank(lengths: list[int], ring: int, rank: int, policy: str) -> tuple[float, float]:
    """The best time for the layout, and the best for the plan."""
    times = []
    for _ in range(REPEATS if policy != "zigzag" else 1):
        docs, mesh = Documents(lengths), _mesh(ring, rank, policy == "open")
        begin = time.perf_counter()
        layout = Layout(docs, mesh, "auto" if policy == "open" else policy)
        _ = layout.positions
        placed = time.perf_counter()
        plan_parts(layout, Shape(32, 8, 128, 128))
        times.append((placed - begin, time.perf_counter() - placed))
    return min(a for a, _ in times), min(b for _, b in times)


def _mesh(ranks: int, rank: int, with_open_degrees: bool) -> MeshShape:
    machine, ring = SHIPPED["H200"], MeshShape(1, ranks)
    every = [MeshShape(1, *degrees, rank, machine=machine) for degrees in ring.parted(8)] if with_open_degrees else []
    return MeshShape(1, ranks, 1, rank, machine=machine, alternatives=tuple(every))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="also write the table to this file")
    arguments = parser.parse_args()
    lines = ["| documents | ranks | layout | layout ms | plan ms |", "|---|---|---|---|---|"]
    for count, ring in CASES:
        random = Random(0)
        lengths = [int(random.lognormvariate(6.5, 1.3)) + 1 for _ in range(count)]
        for policy in ("auto", "open", "balanced", "zigzag") if ring <= 64 else ("auto", "balanced"):
            columns = "{:.1f} | {:.1f}".format(*milliseconds(lengths, ring, policy))
            lines.append(f"| {count} | {ring} | {policy} | {columns} |")
    print("\n".join(lines))
    head = [
        "# Time to place and plan a pack",
        "",
        f"{date.today()}, {platform.processor() or platform.machine()}, one thread of a shared machine, Python "
        f"{platform.python_version()}; median over ranks of the best of {REPEATS} runs (zigzag: one), "
        'scheme="auto". `python benchmarks/planning.py`',
        "",
    ]
    if arguments.out:
        with open(arguments.out, "w") as file:
            file.write("\n".join([*head, *lines]) + "\n")


if __name__ == "__main__":
    main()
