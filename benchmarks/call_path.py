"""The cost of our call path: `parallel_attention` on one GPU beside the kernel called directly.

    python benchmarks/call_path.py --out benchmarks/results/call_path.md

One causal document, 32 query and 8 key heads of 128, bfloat16. Runs of calls, as a model's layers make
them, ours and the kernel's in turn so that both see the same clocks; median of CUDA-event times. Afterwards a step is
run with host synchronisations forbidden.
"""

import argparse
import statistics
from collections.abc import Callable
from datetime import date
from typing import Any

import torch

from ringattn import Documents, Layout, MeshShape, parallel_attention
from ringattn.kernels.registry import backends, explain
from ringattn.kernels.spec import Block, Call, CallSpec, Grads, Options, SavedCall

HEADS, KEY_HEADS, DIM = 32, 8, 128
LENGTHS = (8192, 32768, 65536)


def timed(functions: list[Callable[[], Any]], calls: int, repeats: int = 9) -> list[float]:
    """Median milliseconds of a call of each, from runs of `calls` calls."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, found in zip(functions, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(calls):
                function()
            end.record()
            torch.cuda.synchronize()
            if repeat:  # the first warms up
                found.append(begin.elapsed_time(end) / calls)
    return [statistics.median(found) for found in times]


def row(name: str, length: int) -> str:
    x = [torch.randn(length, h, DIM, device="cuda", dtype=torch.bfloat16) for h in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)]
    q, k, v, dout = x
    backend, options = backends()[name], Options(DIM**-0.5)
    call = Call((Block((0, length), (0, length), -1, 0),), -1, 0)
    out, grads = torch.empty_like(q), Grads(torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    lse = backend.forward(q, k, v, call, options, out)

    def kernel_forward() -> Any:
        return backend.forward(q, k, v, call, options, out)

    def kernel_both() -> None:
        kernel_forward()
        backend.backward(dout, SavedCall(q, k, v, out, lse, call, options), grads)

    layout = Layout(Documents([length]), MeshShape())
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]

    def ours_forward() -> torch.Tensor:
        with torch.no_grad():
            return parallel_attention(*leaves, layout, backend=name)

    def ours_both() -> None:
        torch.autograd.grad(parallel_attention(*leaves, layout, backend=name), leaves, dout)

    calls = max(2, 2**19 // length // 8)
    forward, ours, alone, both = timed([kernel_forward, ours_forward, kernel_both, ours_both], calls)
    torch.cuda.set_sync_debug_mode("error")
    ours_both()
    torch.cuda.set_sync_debug_mode("default")
    flops = 2 * length**2 * HEADS * DIM * 1e-9
    return (
        f"| {name} | {length} | {forward:.3f} | {flops / forward:.0f} | {ours:.3f} | {forward / ours:.3f} | "
        f"{alone:.3f} | {3.5 * flops / alone:.0f} | {both:.3f} | {alone / both:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="also write the table to this file")
    arguments = parser.parse_args()
    spec = CallSpec("cuda", torch.bfloat16, DIM, DIM, HEADS, KEY_HEADS)
    able = [name for name, reason in explain(spec).items() if reason is None and name not in ("reference", "flex")]
    head = [
        f"# Our call path beside the kernel alone, {torch.cuda.get_device_name()}",
        "",
        f"{date.today()}, torch {torch.__version__}. `python benchmarks/call_path.py`; no host "
        "synchronisation in a step.",
        "",
        "| kernel | tokens | alone f ms | TFLOP/s | ours ms | share | alone f+b ms | TFLOP/s | ours ms | share |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    text = "\n".join(head + [row(name, length) for name in able for length in LENGTHS]) + "\n"
    print(text)
    if arguments.out:
        with open(arguments.out, "w") as file:
            file.write(text)


if __name__ == "__main__":
    main()
