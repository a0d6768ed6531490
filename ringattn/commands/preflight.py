"""Look at every node before a run: which one is slow, different or broken, in one page.

    ringattn preflight                                this machine alone
    ringattn preflight --nodes 2 --node-rank 0 --endpoint node0:29500    on node0, and on the
                                                      other machine the same with --node-rank 1
    srun --ntasks-per-node=1 ringattn preflight       on every node of a SLURM allocation

Compared over the nodes: versions, sources, clocks, environment, limits, kernels, devices. Looked at
on each: memory (written and read), matrix products (equal bits, equal time), free disk. Between
them: whether all see the output folder, whether each reaches each other, and the bandwidth and
latency of every pair of devices inside a node and of the same place on two nodes.

Node 0 prints the page. Every wait ends: a node that does not come or stops answering is named.
Exit code 0 if a run can start, 1 if something is wrong, 2 for wrong arguments.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ringattn.commands._call import RANKS, check_device, integer
from ringattn.commands._text import row

SECONDS = 3600
FIRST_PORT, PORTS = 30_000, 2_700  # of jobs: beside the port of their run, below those that the system hands out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nproc",
        "--nproc-per-node",
        type=integer(RANKS),
        metavar="N",
        help="devices of this node, default all, on the CPU 2",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is a CUDA device, else cpu")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs"),
        metavar="FOLDER",
        help="where a run would write, default outputs",
    )
    parser.add_argument(
        "--free", type=integer(1 << 20), default=10, metavar="GIB", help="that must be free there, default 10"
    )
    parser.add_argument(
        "--machine",
        metavar="NAME",
        help="whose speeds are expected: as RINGATTN_MACHINE, which is the default, else those of this machine's kind",
    )
    parser.add_argument(
        "--slow",
        type=integer(99),
        default=50,
        metavar="PERCENT",
        help="below so much of the expected or usual speed something is slow, default 50",
    )
    parser.add_argument(
        "--timeout",
        type=integer(SECONDS),
        default=120,
        metavar="S",
        help="how long each step, and a node to come, is waited for, default 120",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the page and all that it comes from as one JSON object"
    )
    machines = parser.add_argument_group("several machines, on each with the same endpoint, in any order")
    machines.add_argument(
        "--nodes",
        type=integer(RANKS),
        metavar="N",
        help="default NNODES, else those of srun's step, else this one alone",
    )
    machines.add_argument(
        "--node-rank", metavar="R", help="from 0 to N-1, default NODE_RANK; node 0 listens and prints"
    )
    machines.add_argument(
        "--endpoint", metavar="HOST:PORT", help="of node 0, reachable from all, the port free there; default ENDPOINT"
    )
    machines.add_argument(
        "--id", metavar="NAME", help="tells jobs of one endpoint apart, default JOB_ID, else ringattn"
    )
    machines.add_argument(
        "--hosts", metavar="A,B,...", help="names of all nodes in order, by which missing ones are told"
    )


def run(args: argparse.Namespace) -> int:
    check_device(args)
    where = place(args, os.environ)
    options, bounds = options_of(args, where)

    from ringattn.preflight.judge import judge
    from ringattn.preflight.look import look, tell_verdict
    from ringattn.preflight.meeting import NotThere

    try:
        meeting, reports = look(options)
        verdict = None
        if options.node == 0:
            checks = [asdict(check) for check in judge(reports, bounds)]
            verdict = {"checks": checks, "ok": not any(check["problems"] for check in checks)}
            print(json.dumps(verdict | {"nodes": reports}, indent=2) if args.json else render(verdict, options.nodes))
            sys.stdout.flush()
        verdict = tell_verdict(meeting, verdict, sorted(reports), options.seconds)
    except NotThere as error:
        print(f"ringattn preflight: {error}", file=sys.stderr)
        return 1
    return 0 if verdict["ok"] else 1


def place(args: argparse.Namespace, environ: Mapping[str, str]) -> tuple[int, int, str | None, str]:
    """Number of this node, how many there are, the endpoint, and the name of this preflight."""
    name = args.id or environ.get("JOB_ID") or environ.get("SLURM_JOB_ID") or "ringattn"
    if not re.fullmatch(r"[\w.-]+", name):
        args.parser.error(f"--id must be of letters, digits, '.', '_' and '-', got {name!r}")
    if "TORCHELASTIC_RUN_ID" in environ:
        args.parser.error("start it once on each node, without torchrun: it starts a process for each device itself")
    count = args.nodes or environ.get("NNODES")
    if count is None and not (args.node_rank or args.endpoint or args.hosts) and "SLURM_STEP_NODELIST" in environ:
        return _of_slurm(args, environ, name)
    if count is None:
        if args.node_rank or args.endpoint or args.hosts:
            args.parser.error("missing: --nodes (or NNODES)")
        return 0, 1, None, name
    if not str(count).isdecimal() or not 1 <= int(count) <= RANKS:
        args.parser.error(f"NNODES must be an integer from 1 to {RANKS}, got {count!r}")
    nodes, node = int(count), args.node_rank or environ.get("NODE_RANK", "")
    endpoint = args.endpoint or environ.get("ENDPOINT", "")
    if not node.isdecimal() or int(node) >= nodes:
        args.parser.error(f"--node-rank (or NODE_RANK) must be an integer from 0 to {nodes - 1}, got {node!r}")
    if not re.fullmatch(r".+:[0-9]{1,5}", endpoint):
        args.parser.error(f"--endpoint (or ENDPOINT) must be HOST:PORT, got {endpoint!r}")
    return int(node), nodes, endpoint, name


def _of_slurm(args: argparse.Namespace, environ: Mapping[str, str], name: str) -> tuple[int, int, str | None, str]:
    """From the variables of a task of srun, one for each node."""
    from ringattn.training.start.launched import first_host

    nodes, tasks = int(environ["SLURM_STEP_NUM_NODES"]), int(environ["SLURM_STEP_NUM_TASKS"])
    if tasks != nodes:
        args.parser.error(f"srun must start one task on each node (--ntasks-per-node=1), got {tasks} on {nodes}")
    port = FIRST_PORT + int(environ.get("SLURM_JOB_ID", "0")) % PORTS
    return int(environ["SLURM_NODEID"]), nodes, f"{first_host(environ['SLURM_STEP_NODELIST'])}:{port}", name


def options_of(args: argparse.Namespace, where: tuple[int, int, str | None, str]) -> tuple[Any, Any]:
    """`look.Options` and `checks.Bounds` of the command line."""
    import torch

    from ringattn.kernels.tuning.store import default_folder
    from ringattn.preflight.checks import Bounds
    from ringattn.preflight.look import Options

    node, nodes, endpoint, name = where
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    ranks = args.nproc or (torch.cuda.device_count() if device == "cuda" else 2)
    if device == "cuda" and ranks > torch.cuda.device_count():
        args.parser.error(f"--nproc {ranks}: this node has {torch.cuda.device_count()} CUDA devices")
    hosts = args.hosts.split(",") if args.hosts else [""] * nodes
    if len(hosts) != nodes:
        args.parser.error(f"--hosts must name {nodes} nodes, got {len(hosts)}")
    try:
        machine = expected(args.machine, device)
    except ValueError as error:
        args.parser.error(str(error))
    options = Options(node, nodes, endpoint, name, device, ranks, args.output, default_folder(), float(args.timeout))
    return options, Bounds(tuple(hosts), device, machine, args.slow / 100, args.free << 30)


def expected(name: str | None, device: str) -> Any:
    """Whose speeds are expected: one that was named, else one that was measured here, else one of this very kind.

    Links of unknown GPUs, and of CPUs, differ too much to expect any. Raises ValueError for a name that is none.
    """
    import torch

    from ringattn.environment import MACHINE
    from ringattn.parallel.machine.shipped import local_machine, named_machine

    if name is not None:
        return named_machine("--machine", name)
    machine = local_machine(device)
    if MACHINE.read() is not None or machine.provenance.get("origin") == "measured":
        return machine
    if device == "cuda" and any(kind in torch.cuda.get_device_name() for kind in (machine.name, "H800", "A800")):
        return machine
    return None


def render(verdict: dict[str, Any], nodes: int) -> str:
    """The page: what was seen, then what is odd, then what is wrong, which people read first from below."""
    lines = [f"Preflight of {nodes} node{'s' * (nodes > 1)}"]
    for check in verdict["checks"]:
        mark = f"{len(check['problems'])} wrong" if check["problems"] else "ok"
        lines += row(f"{check['name']:<15}{mark}", check["seen"], pad=24)
    for title, found in (
        ("Odd", [text for check in verdict["checks"] for text in check["remarks"]]),
        ("Wrong", [problem["text"] for check in verdict["checks"] for problem in check["problems"]]),
    ):
        if found:
            lines += ["", title, *(line for text in found for line in row("-", text, gap=" "))]
    count = sum(len(check["problems"]) for check in verdict["checks"])
    return "\n".join([*lines, "", "A run can start." if verdict["ok"] else f"{count} found: mend or leave out."])
