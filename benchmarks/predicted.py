"""The planner's predictions beside a benchmark's times.

    python benchmarks/predicted.py benchmark.json --out benchmarks/results/predicted.md

Reads what `recipes/benchmark.py` wrote. Prices need no device; by default they are the shipped machine's.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from ringattn import Layout, MeshShape
from ringattn.benchmarking.workloads import workload
from ringattn.parallel.choice.schedule import choose
from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.pricing.pricer import Pricer
from ringattn.parallel.pricing.setting import PriceInputs
from ringattn.parallel.schedules.candidates import candidates

# Schemes on a mesh: of degrees that a layout chooses, and of other systems, nothing is predicted.
PREDICTED = re.compile(r"(?!usp)\w+:\d+x\d+")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="benchmark.json")
    parser.add_argument("--machine", type=Path, help="a calibration's JSON; default: the shipped H200")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    machine = Machine.from_json(arguments.machine.read_text()) if arguments.machine else SHIPPED["H200"]
    content = json.loads(arguments.results.read_text())
    rows, worst = [], 0.0
    for result in content["results"]:
        if PREDICTED.fullmatch(result["contestant"]) and result["both"]:
            row, error = compared(result, content["facts"], machine)
            rows.append(row)
            worst = max(worst, abs(error))
    facts = content["facts"]
    text = "\n".join(
        [
            f"# Predicted and measured times, {facts['ranks']} × {facts['device']}",
            "",
            f"{facts['date']}; predictions of {machine}, times of `{facts['command']}`. Milliseconds.",
            "",
            "| workload | contestant | f measured | predicted | b measured | predicted | f+b off by |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"Forward and backward together: off by at most {worst:.0%}.",
        ]
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


def compared(result: dict[str, Any], facts: dict[str, Any], machine: Machine) -> tuple[str, float]:
    """A row of the table, and how far the prediction of both passes together is off."""
    scheme, degrees = result["contestant"].split(":")
    ring, ulysses = map(int, degrees.split("x"))
    query_heads, key_heads = map(int, facts["heads"].split("/"))
    work = workload(result["workload"], facts["seed"])
    layout = Layout(work.docs, MeshShape(1, ring, ulysses), mask=work.mask)
    shape = Shape(query_heads, key_heads, facts["head_dim"], facts["head_dim"], 2)
    pricer = Pricer.of(layout.parts[0], work.mask, PriceInputs(machine, shape))
    cost = choose(pricer, candidates(ring, scheme, None), None).cost
    forward, backward = cost.forward.seconds * 1e3, cost.backward.seconds * 1e3
    measured = result["forward"], result["both"] - result["forward"]
    error = (forward + backward) / result["both"] - 1
    row = (
        f"| {result['workload']} | {result['contestant']} | {measured[0]:.2f} | {forward:.2f} | {measured[1]:.2f} | "
        f"{backward:.2f} | {error:+.1%} |"
    )
    return row, error


if __name__ == "__main__":
    main()
