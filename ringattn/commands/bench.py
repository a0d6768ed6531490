"""Measure this machine for the planner: kernels, copies, merges and links.

    ringattn bench --calibrate
    torchrun --nproc-per-node 8 -m ringattn bench --calibrate

One process measures the device; under torchrun the links between the ranks are measured too.
What cannot be measured stays as it was: from an earlier calibration, else shipped. The result is
kept in RINGATTN_CACHE_DIR, with hardware and versions, and every later mesh plans for it.
"""

import argparse
import json
import os
import sys
from typing import Any

from ringattn.commands._call import DTYPES, check_backend, check_device, head_dim, heads, integer
from ringattn.commands._files import check_target, file
from ringattn.commands._text import first_line, row

DAY = 86400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibrate",
        action="store_true",
        required=True,
        help="measure this machine and store the result (there is no other use yet)",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is a CUDA device, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="of the timed kernels; default: bfloat16, on CPUs float32")
    parser.add_argument(
        "--heads", type=heads, default=(8, 2), metavar="H/K", help="numbers of query and key heads, default 8/2"
    )
    parser.add_argument(
        "--head-dim", type=head_dim, nargs="+", default=[128], metavar="D", help="head dims to measure, default 128"
    )
    parser.add_argument("--backend", default="auto", help="kernel to time, default auto")
    parser.add_argument(
        "--seconds", type=integer(DAY), default=30, metavar="N", help="time for all timed runs, default 30"
    )
    parser.add_argument(
        "--out", type=file, metavar="FILE", help="store here instead of in the cache; missing folders are made"
    )
    parser.add_argument("--json", action="store_true", help="print what is stored, as JSON")


def run(args: argparse.Namespace) -> int:
    import torch
    import torch.distributed as dist

    from ringattn.parallel.mesh.mesh import init_mesh

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check(args, device)
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    started = launched and not dist.is_initialized()
    if launched:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        init_mesh(device_type=device)
    try:
        report = measure(args, device)
    except (NotImplementedError, MemoryError, RuntimeError) as error:
        print(f"ringattn bench: error: this cannot be measured: {first_line(error)}", file=sys.stderr)
        return 1
    finally:
        if started:
            dist.destroy_process_group()
    if not launched or os.environ.get("RANK", "0") == "0":
        print(json.dumps(report["machine"], indent=1) if args.json else render(report))
    return 0


def check(args: argparse.Namespace, device: str) -> None:
    """Ends the program for what cannot be measured or stored."""
    from ringattn.parallel.machine.shipped import calibration_path, local_machine

    check_device(args)
    check_backend(args)
    try:
        local_machine(device)
        check_target("--out" if args.out else "RINGATTN_CACHE_DIR:", args.out or calibration_path(device))
    except ValueError as error:
        args.parser.error(str(error))


def measure(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """The calibration, and where the first rank of each node stored it."""
    import torch

    from ringattn.parallel.machine.calibrate import Calibration
    from ringattn.parallel.machine.shipped import keep, local_machine, write

    dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    calibration = Calibration(
        device, tuple(args.head_dim), args.heads, getattr(torch, dtype), args.backend, float(args.seconds)
    )
    machine = calibration.run(local_machine(device))
    path = None
    if os.environ.get("LOCAL_RANK", "0") == "0":
        path = write(machine, args.out) if args.out else keep(machine, device)
    return {"machine": json.loads(machine.to_json()), "path": str(path) if path else None}


def render(report: dict[str, Any]) -> str:
    """The calibration for people."""
    machine, provenance = report["machine"], report["machine"]["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    lines = [f"{machine['name']}, {machine['gpus_per_node']} per node", *row("", versions, ""), "", "Measured"]
    for what, how in provenance["measured"].items():
        lines += row(f"{what:<36}", how)
    lines += row(f"{'the rest':<36}", provenance["the rest"])
    lines += ["", "Kernels"]
    for rate in machine["rates"]:
        label = f"head dim {rate['head_dim']} {'backward' if rate['backward'] else 'forward'}"
        text = (
            f"{rate['flops'] / 1e12:.4g} TFLOP/s on {rate['units']} units, tile {rate['query_tile']} × "
            f"{rate['key_tile']} + {rate['tile_seconds'] * 1e6:.2f} µs, launch {rate['launch_seconds'] * 1e6:.1f} µs"
        )
        lines += row(f"{label:<36}", text)
    lines += ["", "Links and copies"]
    for key, link in machine["links"].items():
        text = f"{link['bandwidth'] / 1e9:.4g} GB/s, latency {link['latency'] * 1e6:.1f} µs"
        lines += row(f"{key:<36}", text)
    text = f"{machine['copy_bandwidth'] / 1e9:.4g} GB/s read and written, fixed {machine['copy_seconds'] * 1e6:.1f} µs"
    lines += row(f"{'copies':<36}", text)
    lines += row(f"{'merges':<36}", f"{machine['merge_bandwidth'] / 1e9:.4g} GB/s read and written")
    return "\n".join([*lines, "", f"stored in {report['path']}"])
