"""How this process was started: by torchrun, as a task of SLURM's srun, or alone.

The one place that reads their variables.
"""

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Launch:
    """One process among the processes of a run.

    Arguments:
        kind: `torchrun`, `slurm` or `single`.
        rank, world_size: of all processes.
        local_rank, ranks_per_node: of this machine.
        master_addr, master_port: where rank 0 listens.
    """

    kind: str
    rank: int
    world_size: int
    local_rank: int
    ranks_per_node: int
    master_addr: str
    master_port: int

    @property
    def ranks_here(self) -> range:
        """Of this machine."""
        first = self.rank - self.local_rank
        return range(first, first + self.ranks_per_node)


def detect(environ: Mapping[str, str]) -> Launch:
    """Reads the environment: torchrun's variables first (it may itself run under SLURM), then those of an srun step.

    Raises ValueError if torchrun's variables are there only in part.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _torchrun(environ)
    # An sbatch script itself also has SLURM_PROCID=0; only the tasks of a step know the number of tasks of the step.
    if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environ:
        return _slurm(environ)
    return Launch("single", 0, 1, 0, 1, "127.0.0.1", int(environ.get("MASTER_PORT", "0")) or free_port())


def is_first(environ: Mapping[str, str]) -> bool:
    """Whether this process is the one that speaks; also true if the launch cannot be read."""
    return environ.get("RANK", environ.get("SLURM_PROCID", "0")) == "0"


def speaks_for_machine(environ: Mapping[str, str]) -> bool:
    """Whether this process is the first of its machine; also true if the launch cannot be read."""
    return environ.get("LOCAL_RANK", environ.get("SLURM_LOCALID", "0")) == "0"


def export(launch: Launch, environ: MutableMapping[str, str]) -> None:
    """Sets what `torch.distributed.init_process_group` reads."""
    environ.update(
        RANK=str(launch.rank),
        WORLD_SIZE=str(launch.world_size),
        LOCAL_RANK=str(launch.local_rank),
        LOCAL_WORLD_SIZE=str(launch.ranks_per_node),
        MASTER_ADDR=launch.master_addr,
        MASTER_PORT=str(launch.master_port),
    )


def pick_device(launch: Launch) -> torch.device:
    """This rank's GPU, made the current one, or the CPU if the machine has none.

    Raises ValueError if a machine runs more ranks than it has GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # srun may show each task its own GPU only, as number 0.
    alone = count == 1 and launch.kind == "slurm"
    index = 0 if alone else launch.local_rank
    # On every rank of the machine: those that have a GPU would wait for the others.
    if launch.ranks_per_node > count and not alone:
        raise ValueError(
            f"{launch.ranks_per_node} ranks were started on a machine with {count} GPUs; one GPU per rank is needed"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _torchrun(environ: Mapping[str, str]) -> Launch:
    missing = [key for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if key not in environ]
    if missing:
        raise ValueError(
            f"the environment sets RANK or WORLD_SIZE but not {', '.join(missing)}; start with torchrun or srun"
        )
    rank, world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    return Launch(
        "torchrun",
        rank,
        world_size,
        int(environ.get("LOCAL_RANK", rank)),
        int(environ.get("LOCAL_WORLD_SIZE", world_size)),
        environ["MASTER_ADDR"],
        int(environ["MASTER_PORT"]),
    )


def _slurm(environ: Mapping[str, str]) -> Launch:
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ["SLURM_STEP_NUM_TASKS"]
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "127.0.0.1")
    # The same port on every task of a job, and most likely another one for another job.
    port = 20_000 + int(environ.get("SLURM_JOB_ID", "0")) % 20_000
    return Launch(
        "slurm",
        int(environ["SLURM_PROCID"]),
        int(environ["SLURM_STEP_NUM_TASKS"]),
        int(environ["SLURM_LOCALID"]),
        _same_on_every_node(tasks),
        environ.get("MASTER_ADDR") or first_host(nodes),
        int(environ.get("MASTER_PORT", port)),
    )


def _same_on_every_node(tasks: str) -> int:
    """SLURM writes `8(x4)` for four nodes of eight tasks, and `8(x3),4`, a ValueError here, where they differ."""
    counts = {int(re.sub(r"\(x\d+\)", "", part)) for part in tasks.split(",")}
    if len(counts) != 1:
        raise ValueError(f"every node must run the same number of tasks, SLURM says {tasks!r}; use --ntasks-per-node")
    return counts.pop()


def first_host(nodelist: str) -> str:
    """The first host of SLURM's compressed list: `gpu[003-008,012],login` gives `gpu003`."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]+)\])?([^,\[]*)", nodelist)
    if match is None:
        raise ValueError(f"SLURM's list of nodes cannot be read: {nodelist!r}")
    prefix, numbers, suffix = match.groups()
    return prefix + (re.split(r"[-,]", numbers)[0] if numbers else "") + suffix


def free_port() -> int:
    """A port that nobody listens on now."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def current() -> Launch:
    """This process's launch, exported to its environment. Raises ValueError as `detect` does."""
    launch = detect(os.environ)
    export(launch, os.environ)
    return launch
