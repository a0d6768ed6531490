"""Balance and traffic of the balanced layout over packs of the published histogram: no device, no processes.

    python benchmarks/balance.py --out benchmarks/results/balance.md

Cost is the attention area of a rank, and the predicted kernel time where kernel time is balanced. The received share is
key rows received by all ranks over those of an all-gather, (ranks - 1) times the tokens.
"""

import argparse
from dataclasses import dataclass
from datetime import date
from statistics import mean

import numpy as np

from ringattn import Documents, Layout, Mask, MeshShape
from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.parallel.placement.pieces import PieceTable
from ringattn.parallel.schedules.demand import KeyDemand, sum_by
from ringattn.workloads import HISTOGRAMS

WINDOWS = ((1023, 0), (1023, 1023), (4095, 4095), (8191, 255), (1023, -1))
POLICIES = ("balanced", "balanced by time", "zigzag", "contiguous")


@dataclass(frozen=True)
class Balance:
    """One pack: largest over mean of area, kernel time and tokens; the all-gather's bytes' share; ranges of a rank."""

    area: float
    time: float
    tokens: float
    received: float
    ranges: float


def balance(
    lengths: list[int], ring: int, policy: str, mask: Mask = Mask(), machine: Machine = SHIPPED["H200"]
) -> Balance:
    """What a policy makes of a pack; "balanced by time" is "balanced" with the machine's kernel times."""
    given = machine if policy == "balanced by time" else None
    layout = Layout(Documents(lengths), MeshShape(1, ring), policy.split()[0], mask, machine=given)
    demand = KeyDemand.of(PieceTable.of(layout.parts[0], mask), mask.band)
    blocks = demand.gathered_blocks
    seconds = sum(machine.rate(128, backward).share_seconds(blocks, 256) for backward in (False, True))
    areas, times = (sum_by(demand.position, np.asarray(x, dtype=float), ring) for x in (blocks.areas, seconds))
    received = demand.received_rows.sum() / ((ring - 1) * sum(lengths))
    return Balance(
        *(float(x.max() / x.mean()) for x in (areas, times, demand.rows)),
        received=float(received),
        ranges=sum(map(len, layout.positions)) / ring,
    )


def columns_of(found: list[Balance], digits: int) -> list[str]:
    """Area, time, tokens and received share of several packs; the share with so many digits."""

    def shown(values: list[float], digits: int = 3) -> str:
        return f"{mean(values):.{digits}f} ({max(values):.{digits}f})"

    area, time = shown([one.area for one in found]), shown([one.time for one in found])
    return [area, time, f"{max(one.tokens for one in found):.3f}", shown([one.received for one in found], digits)]


def windows_table(packs: int, per_rank: int, rings: list[int]) -> list[str]:
    """The balanced layout under windows, whose documents' first and last tokens cost less than the others."""
    lines = [
        "| ranks | window | area max/mean, mean (worst) | kernel time max/mean, mean (worst) | tokens max/mean "
        "| received share, mean (worst) | ranges a rank |",
        "|---|---|---|---|---|---|---|",
    ]
    for ring in rings:
        tokens = ring * per_rank
        cases = [HISTOGRAMS["chatqa"].pack(tokens, seed, tokens // 4) for seed in range(packs)]
        for window in WINDOWS:
            mask = Mask(causal=window[1] == 0, window=window)
            found = [balance(lengths, ring, "balanced", mask) for lengths in cases]
            columns = columns_of(found, 4)
            columns.append(f"{mean(one.ranges for one in found):.1f}")
            lines.append(f"| {ring} | {window} | {' | '.join(columns)} |")
            print(lines[-1], flush=True)
    return lines


def table(packs: int, per_rank: int, rings: list[int]) -> list[str]:
    lines = [
        "| ranks | longest document | policy | area max/mean, mean (worst) | kernel time max/mean, mean (worst) "
        "| tokens max/mean | received share, mean (worst) |",
        "|---|---|---|---|---|---|---|",
    ]
    for ring in rings:
        tokens = ring * per_rank
        limits = {"a quarter of the pack": tokens // 4, "as published": HISTOGRAMS["chatqa"].longest}
        for label, longest in list(limits.items())[: 1 + (limits["as published"] > tokens // 4)]:
            cases = [HISTOGRAMS["chatqa"].pack(tokens, seed, longest) for seed in range(packs)]
            for policy in POLICIES:
                if policy == "zigzag" and ring > 8:
                    continue  # planning it takes a second a pack, and it is the same for any number of ranks
                found = [balance(lengths, ring, policy) for lengths in cases]
                columns = columns_of(found, 3)
                lines.append(f"| {ring} | {label} | {policy} | {' | '.join(columns)} |")
                print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="also write the table to this file")
    parser.add_argument("--packs", type=int, default=100)
    parser.add_argument("--tokens-per-rank", type=int, default=32768)
    parser.add_argument("--windows-tokens-per-rank", type=int, default=8192)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    arguments = parser.parse_args()
    lines = table(arguments.packs, arguments.tokens_per_rank, arguments.ranks)
    windows = windows_table(arguments.packs, arguments.windows_tokens_per_rank, arguments.ranks)
    head = [
        "# Balance of layouts over packs of the published histogram",
        "",
        f"{date.today()}, {arguments.packs} packs (seeds 0 to {arguments.packs - 1}), {arguments.tokens_per_rank} "
        "tokens a rank, causal, integers only. `python benchmarks/balance.py`",
        "",
        "Kernel time is predicted by the shipped H200 rates, forward and backward, head dim 128. The received share is "
        "of an all-gather's key rows.",
        "",
    ]
    under_windows = [
        "",
        "## Under windows",
        "",
        f"The balanced layout of as many packs at {arguments.windows_tokens_per_rank} tokens a rank, no document "
        "longer than a quarter of the pack. A window is (left, right), causal where it ends at 0, -1 open. The first "
        "tokens of a document, and under windows that look ahead the last ones too, see less than others: shares of a "
        "cut document are chosen so that each has its part of them. Short cuts cost kernel time that area does not "
        "show.",
        "",
    ]
    if arguments.out:
        with open(arguments.out, "w") as file:
            file.write("\n".join([*head, *lines, *under_windows, *windows]) + "\n")


if __name__ == "__main__":
    main()
