"""Times attention beside the bare kernel: `torchrun --nproc-per-node 8 recipes/benchmark.py [key=value]`.

Every scheme on every mesh of the ranks, the kernel alone on an even share of the heads, and other systems, in one run
on the same kernel. `graphs=true` measures each a second time as replays of captured CUDA graphs, and `+graph` after a
name that one only. Keys and their meaning: configs/benchmark.yaml. Exit codes: 0 done, 1 if a result differed from the
kernel's, 2 for a configuration that cannot run.
"""

import os
import sys
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.distributed as dist
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ringattn.benchmarking.peers import versions
from ringattn.benchmarking.problem import Heads, Problem, spec_of
from ringattn.benchmarking.report import header, line, plot, write
from ringattn.benchmarking.roster import contestants, every_name, parse
from ringattn.benchmarking.slow import Slow
from ringattn.benchmarking.suite import Result, measure
from ringattn.benchmarking.timing import Timer
from ringattn.benchmarking.workloads import Workload, workload
from ringattn.first_failure import FirstFailure
from ringattn.kernels.registry import choose
from ringattn.parallel.mesh.mesh import TRANSPORTS
from ringattn.training.failures import reported
from ringattn.training.start.launched import Launch, current, export, pick_device
from ringattn.training.start.refusal import of_a_list, refuse

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@hydra.main(config_path="../configs", config_name="benchmark", version_base=None)
def main(cfg: DictConfig) -> None:
    try:
        launch = current()
        device = pick_device(launch)
        heads, workloads, dtype = check(cfg, launch, device)
        slow = slowed(cfg, launch)
    except (ValueError, NotImplementedError, OmegaConfBaseException) as error:
        refuse(error)
    export(launch, os.environ)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    results = run(cfg, heads, workloads, dtype, device, slow, launch.rank == 0)
    dist.destroy_process_group()
    sys.exit(1 if any(result.error and result.failure for result in results) else 0)


def check(cfg: DictConfig, launch: Launch, device: torch.device) -> tuple[Heads, list[Workload], torch.dtype]:
    """Everything that can be wrong with the configuration, before any process group starts."""
    parts = str(cfg.heads).split("/")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts) or int(parts[0]) % int(parts[1]):
        raise ValueError(
            f"heads must be <query>/<key>, the first a multiple of the second, as in 32/8, got {cfg.heads}"
        )
    heads = Heads(int(parts[0]), int(parts[1]), int(cfg.head_dim))
    name = ("bfloat16" if device.type == "cuda" else "float32") if cfg.dtype == "auto" else cfg.dtype
    if name not in DTYPES:
        raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {cfg.dtype}")
    for key in ("calls", "repeats"):
        if not isinstance(cfg[key], int) or cfg[key] < 1:
            raise ValueError(f"{key} must be an integer >= 1, got {cfg[key]}")
    if not isinstance(cfg.graphs, bool):
        raise ValueError(f"graphs must be true or false, got {cfg.graphs}")
    if cfg.transport not in TRANSPORTS:
        raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}, got {cfg.transport}")
    for contestant in cfg.contestants or every_name(launch.world_size):
        parse(contestant, launch.world_size)
    workloads = [workload(one, cfg.seed) for one in cfg.workloads]
    for one in workloads:
        choose(spec_of(one, heads, device, DTYPES[name]), cfg.backend)
    return heads, workloads, DTYPES[name]


def slowed(cfg: DictConfig, launch: Launch) -> Slow | None:
    """The ranks to be slowed. Raises ValueError."""
    if not isinstance(cfg.slow, int | float) or isinstance(cfg.slow, bool) or cfg.slow < 0:
        raise ValueError(f"slow must be a share >= 0 of a step's time, as in 0.1, got {cfg.slow}")
    if not cfg.slow:
        return None
    ranks = tuple(cfg.slow_ranks)
    if not all(isinstance(rank, int) and 0 <= rank < launch.world_size for rank in ranks):
        raise ValueError(f"slow_ranks must be ranks of 0 to {launch.world_size - 1}, got {list(ranks)}")
    return Slow(float(cfg.slow), ranks)


@FirstFailure()
def run(
    cfg: DictConfig,
    heads: Heads,
    workloads: list[Workload],
    dtype: torch.dtype,
    device: torch.device,
    slow: Slow | None,
    first: bool,
) -> list[Result]:
    entered = contestants(cfg.contestants, cfg.peers, cfg.transport, cfg.graphs)
    makers = [partial(Problem.draw, one, heads, cfg.backend, device, dtype, cfg.seed) for one in workloads]
    kernel = choose(spec_of(workloads[0], heads, device, dtype), cfg.backend).name
    output, known = Path(cfg.output), facts(cfg, device, kernel, dtype)
    results: list[Result] = []
    if first:
        print("\n".join(header()), flush=True)
    for result in measure(makers, entered, Timer(device, cfg.calls, cfg.repeats), slow):
        results.append(result)
        if first:
            print(line(result), flush=True)
            write(output, results, known)  # a run that does not come to its end keeps what it has
    if first:
        paths = write(output, results, known)
        if find_spec("matplotlib") is not None:
            paths.append(plot(output / "benchmark.png", results, known))
        print(*paths, sep="\n")
    return results


def facts(cfg: DictConfig, device: torch.device, kernel: str, dtype: torch.dtype) -> dict[str, Any]:
    """What a reader must know to measure it again."""
    overrides = " ".join(sys.argv[1:])
    ranks = dist.get_world_size()
    return {
        "date": str(date.today()),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU rank",
        "ranks": ranks,
        "versions": ", ".join([f"torch {torch.__version__}", *versions()]),
        "dtype": str(dtype).removeprefix("torch."),
        "heads": str(cfg.heads),
        "head_dim": cfg.head_dim,
        "kernel": kernel,
        "seed": cfg.seed,
        "slow": float(cfg.slow),
        "slow_ranks": list(cfg.slow_ranks),
        "command": f"torchrun --nproc-per-node {ranks} recipes/benchmark.py {overrides}".strip(),
    }


if __name__ == "__main__":
    # Hydra prints and exits by itself, on every rank, unless asked for its exceptions.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        reported(main)()
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        refuse(error)
    except ValueError as error:
        if (told := of_a_list(error)) is None:
            raise
        refuse(told)
