"""Errors against float64 when an attention is split over 2 to 64 ranks, emulated on one GPU.

    python benchmarks/stages.py --out benchmarks/results/stages.md

"gather" computes each query row in one call; "ring" merges as many partial results as there are ranks.
Error = ‖x − reference‖ / ‖reference‖; bfloat16 inputs, float64 reference from the same inputs.
"""

import argparse
import platform
from datetime import date

import torch

from benchmarks.emulated import attention
from benchmarks.errors import DIM, HEADS, KEY_HEADS, errors, inputs, reference
from ringattn import Documents, Mask
from ringattn.kernels.registry import explain
from ringattn.kernels.spec import CallSpec

RANKS = (2, 4, 8, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="also write the table to this file")
    parser.add_argument("--tokens", type=int, default=16384, help="length of the one document")
    parser.add_argument("--backends", nargs="*", help="default: every kernel that can do it")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    docs, mask = Documents([arguments.tokens]), Mask()
    x = inputs(docs, device)
    expected = reference(x, docs, mask)
    spec = CallSpec(device.type, torch.bfloat16, DIM, DIM, HEADS, KEY_HEADS)
    able = [name for name, reason in explain(spec).items() if reason is None and name != "reference"]
    rows = []
    for backend in arguments.backends or able:
        single = errors(attention(x, docs, mask, 1, "auto", None, backend), expected)
        rows.append(_row(backend, 1, "one call", single, single))
        for ring in RANKS:
            for scheme, stages in dict.fromkeys((("gather", None), ("ring", 2), ("ring", ring))):
                got = errors(attention(x, docs, mask, ring, scheme, stages, backend), expected)
                label = scheme if stages is None else f"ring, {stages} stages"
                rows.append(_row(backend, ring, label, got, single))
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    head = [
        f"# Errors against float64 by number of ranks, emulated on one {name}",
        "",
        f"{date.today()}, torch {torch.__version__}, bfloat16, {HEADS} query and {KEY_HEADS} key heads of {DIM}, "
        f"one causal document of {arguments.tokens} tokens. `python benchmarks/stages.py`",
        "",
        "Unit 1e-3; in brackets the ratio to one kernel call.",
        "",
        "| backend | ranks | schedule | out | dq | dk | dv |",
        "|---|---|---|---|---|---|---|",
    ]
    text = "\n".join(head + rows) + "\n"
    print(text)
    if arguments.out:
        with open(arguments.out, "w") as file:
            file.write(text)


def _row(backend: str, ring: int, label: str, got: list[float], single: list[float]) -> str:
    shown = " | ".join(f"{error * 1e3:.3f} ({error / one:.3f})" for error, one in zip(got, single, strict=True))
    return f"| {backend} | {ring} | {label} | {shown} |"


if __name__ == "__main__":
    main()
