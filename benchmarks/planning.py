"""Time to place and plan a pack, on the host: python benchmarks/planning.py"""

import statistics
import time
from random import Random

from ringattn import Documents, Layout, Mask, MeshShape
from ringattn.parallel.planner import plan_attention


def milliseconds(lengths: list[int], ring: int, policy: str) -> tuple[float, float]:
    """Median over ranks of the time for the layout and for this rank's plan."""
    times = []
    for rank in range(0, ring, max(1, ring // 9)):
        layout = Layout(Documents(lengths), MeshShape(1, ring, 1, rank), policy)
        begin = time.perf_counter()
        _ = layout.positions
        placed = time.perf_counter()
        plan_attention(layout, Mask(), 32, 8)
        times.append((placed - begin, time.perf_counter() - placed))
    return statistics.median(a for a, _ in times) * 1e3, statistics.median(b for _, b in times) * 1e3


def main() -> None:
    random = Random(0)
    print("| documents | ranks | layout | layout ms | plan ms |\n|---|---|---|---|---|")
    for count, ring in ((200, 8), (1000, 64), (10_000, 1024)):
        lengths = [int(random.lognormvariate(6.5, 1.3)) + 1 for _ in range(count)]
        for policy in ("balanced", "zigzag") if ring <= 64 else ("balanced",):
            print(
                "| {} | {} | {} | {:.1f} | {:.1f} |".format(count, ring, policy, *milliseconds(lengths, ring, policy))
            )


if __name__ == "__main__":
    main()
