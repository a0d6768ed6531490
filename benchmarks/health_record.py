"""What a rank's health record costs: python -m benchmarks.health_record [--layers 32] [--micro-steps 4]

Microseconds for a write, how often a step writes, and the share of a step of so many seconds. Layers write by hooks, as
in training, so a hook's call is in the time.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from ringattn.training.health.rank import Health
from ringattn.training.health.record import Record


class Layers(nn.Module):
    """Layers that do nothing, so that what remains is the hooks."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(layers))
        self.config = type("Config", (), {"get_text_config": lambda config: config, "num_hidden_layers": layers})()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x) * 1  # a tensor of its own, whose gradient has a hook of its own
        return x


def seconds(model: nn.Module, rounds: int) -> float:
    """Of a forward and a backward pass, the least of several."""
    took = []
    for _ in range(rounds):
        x = torch.zeros(1, requires_grad=True)
        began = time.perf_counter()
        model(x).backward()
        took.append(time.perf_counter() - began)
    return min(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--micro-steps", type=int, default=4)
    parser.add_argument("--transfers", type=int, default=12, help="between ranks, of a layer in a micro-step")
    parser.add_argument("--step-seconds", type=float, default=1.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = Record.in_file(Path(folder) / "0-1.record", 0, 1, 0, 1)
        writes = 10_000
        began = time.perf_counter()
        for _ in range(writes):
            record.layer(1)
        write = (time.perf_counter() - began) / writes
        plain, watched = Layers(args.layers), Layers(args.layers)
        Health(record).watch_layers(watched)
        hooks = max(0.0, seconds(watched, 200) - seconds(plain, 200))
    own = args.micro_steps * (2 + args.transfers * args.layers) + 8
    count = own + args.micro_steps * 2 * args.layers
    total = args.micro_steps * hooks + own * write
    print(
        f"{write * 1e6:.2f} µs a write, {hooks / (2 * args.layers) * 1e6:.2f} µs with its hook; {count} writes a step"
    )
    share = total / args.step_seconds
    print(f"{total * 1e3:.3f} ms of a step, {share:.4%} of {args.step_seconds:g} s (the limit is 0.2 %)")


if __name__ == "__main__":
    main()
