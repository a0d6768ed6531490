"""A model shaped like Qwen3.5, four layers with the real heads, trained on one rank and on two: one curve.

    python -m benchmarks.hybrid_curve            two GPUs, NCCL
    python -m benchmarks.hybrid_curve --hosts    as if each rank were on a machine of its own; on one GPU both have it

Prints a table in Markdown: loss and gradient norm of steps, and by how much the second run is off at most.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.failures import curve, variables
from tests.training.forked import ROOT
from tests.training.test_runs import free_port

HEADS = {
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
RUN = [
    "data.seq_len=16384",
    "data.packs_per_step=2",
    "run.save_every=0",
    "run.report=false",
    "optim.lr=3e-4",
    "optim.schedule=constant",
    "optim.warmup_ratio=0",
]


def save_model(folder: Path, width: int) -> None:
    """Three layers that carry states and one of attention, over bytes."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=256, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4, **HEADS
    )
    Qwen3_5ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def train(model: Path, output: Path, ranks: int, hosts: bool, overrides: Sequence[str]) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step. Raises RuntimeError with what the ranks wrote, if one fails."""
    port = free_port()
    words = [sys.executable, "recipes/train.py", f"model.path={model}", f"run.output={output}", *RUN, *overrides]
    log = output.with_suffix(".log")
    with log.open("w") as sink:
        started = [
            subprocess.Popen(words, cwd=ROOT, env=variables(rank, ranks, port, hosts), stdout=sink, stderr=sink)
            for rank in range(ranks)
        ]
        codes = [process.wait() for process in started]
    if any(codes):
        raise RuntimeError(f"{ranks} ranks ended with {codes}:\n{log.read_text()[-3000:]}")
    return curve(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", action="store_true", help="as if each rank were on a machine of its own")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--width", type=int, default=2048, help="of the hidden states")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, torch {torch.__version__}, {args.steps} steps; {' '.join([*RUN, *args.overrides])}\n")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save_model(model, args.width)
        own = [f"run.steps={args.steps}", *args.overrides]
        with ThreadPoolExecutor() as both:  # at once: it is not their times that are compared
            runs = [both.submit(train, model, Path(folder) / str(ranks), ranks, args.hosts, own) for ranks in (1, 2)]
            one, two = (run.result() for run in runs)
    print("| step | loss, 1 rank | 2 ranks | gradient norm, 1 rank | 2 ranks |\n|---|---|---|---|---|")
    for number, (left, right) in enumerate(zip(one, two, strict=True), 1):
        if number in (1, 2, 3, 5, 10, 20, args.steps):
            print(f"| {number} | {left[0]:.5f} | {right[0]:.5f} | {left[1]:.4f} | {right[1]:.4f} |")
    apart = [max(abs(b[at] / a[at] - 1) for a, b in zip(one, two, strict=True)) for at in (0, 1)]
    print(f"\nAt most apart: loss {apart[0]:.1e}, gradient norm {apart[1]:.1e}.")


if __name__ == "__main__":
    main()
