"""Train a language model on long packed documents: on this machine, or on several together.

    ringattn train                                    a small model on Python's own source files
    ringattn train --nproc 4 parallel.ulysses=2 run.steps=500
    ringattn train model=llama_8b data=text 'data.files=[/data/books]' data.seq_len=65536
    ringattn train --cfg job model=llama_8b           print the configuration, train nothing
    ringattn train --config-dir mine --config-name long-books
    ringattn train --nodes 2 --node-rank 0 --endpoint node0:29500    on node0, and on the other
                                                      machine the same with --node-rank 1

Starts torchrun with one rank for each GPU, or with two ranks on the CPU where there is none. What
has no dashes goes to the configuration, as Hydra writes it: group=option, group.key=value.
Files of --config-dir stand beside the shipped ones, or in their place where the names are equal:
mine/model/small.yaml is chosen by model=small, and mine/long-books.yaml may begin with
"defaults: [train, _self_]" and then name only what differs.

The run's folder is run.output, by default outputs/MODEL-DATA below the current folder; the same
command goes on from its newest checkpoint. Ctrl-C and SIGTERM save one first. Exit code 0 if the
run is complete, 2 for wrong arguments, 1 if it failed or was stopped.
"""

import argparse
import io
import os
import re
import runpy
import socket
import sys
from contextlib import redirect_stdout
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from ringattn.commands._call import RANKS, integer

PACKAGE = Path(__file__).parents[1]
# An installed package holds recipes and configurations; in a checkout they stand beside it.
INSTALLED = (PACKAGE / "recipes").is_dir()
HOME = PACKAGE if INSTALLED else PACKAGE.parent
RECIPE, CONFIGS = HOME / "recipes" / "train.py", HOME / "configs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "ringattn train [options] [overrides]"
    parser.epilog = f"The shipped configuration, with a comment on every key: {CONFIGS}"
    parser.allow_abbrev = False  # what is added to Hydra's options later must not change the meaning of a command
    parser.set_defaults(overrides=[])
    parser.add_argument(
        "--nproc",
        "--nproc-per-node",
        type=integer(RANKS),
        default=os.environ.get("NPROC") or None,
        metavar="N",
        help="ranks of this machine, default NPROC, else one for each GPU, else 2",
    )
    configuration = parser.add_argument_group("the configuration")
    configuration.add_argument("--config-dir", type=Path, metavar="FOLDER", help="with configuration files of your own")
    configuration.add_argument("--config-name", metavar="NAME", help="file to start from, default train")
    configuration.add_argument("--cfg", "-c", choices=("job", "hydra", "all"), help="print it and train nothing")
    configuration.add_argument("--package", "-p", metavar="GROUP", help="of what --cfg prints only this part")
    configuration.add_argument("--resolve", action="store_true", help="of what --cfg prints resolve the references")
    configuration.add_argument(
        "--info",
        "-i",
        nargs="?",
        const="all",
        choices=("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
        metavar="WHAT",
        help="print where it comes from and train nothing: all (the default), config, defaults, defaults-tree, plugins "
        "or searchpath",
    )
    machines = parser.add_argument_group("several machines, on each with the same endpoint, in any order")
    machines.add_argument(
        "--nodes",
        type=integer(RANKS),
        default=os.environ.get("NNODES") or None,
        metavar="N",
        help="machines that take part, default NNODES, else this one alone",
    )
    machines.add_argument("--node-rank", metavar="R", help="from 0 to N-1, default NODE_RANK; 0 holds the rendezvous")
    machines.add_argument(
        "--endpoint",
        metavar="HOST:PORT",
        help="of machine 0, reachable from all, the port free there; default ENDPOINT",
    )
    machines.add_argument(
        "--id", metavar="NAME", help="tells jobs of one endpoint apart, default JOB_ID, else ringattn"
    )


def run(args: argparse.Namespace) -> int:
    check(args)
    arguments = [*hydra_options(args), *args.overrides]
    if args.cfg or args.info:
        run_recipe([*printing(args), *arguments])
    else:
        start(args, arguments)
    return 0


def start(args: argparse.Namespace, arguments: list[str]) -> NoReturn:
    """Puts torchrun in the place of this process, so that signals reach it and the exit code is its own."""
    where = rendezvous(args)
    with redirect_stdout(io.StringIO()):  # what is wrong with the configuration is said here, once, and not by ranks
        run_recipe(["--cfg", "job", *arguments])
    ranks = args.nproc or default_ranks()
    # torchrun would set 1; more threads than cores make CPU ranks wait for each other.
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // ranks))
    if not INSTALLED:  # a recipe finds what stands in its own folder, and not the package of its checkout
        paths = [str(HOME), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    launcher = ["-m", "torch.distributed.run", *where, "--nproc-per-node", str(ranks)]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *launcher, str(RECIPE), *arguments])


def check(args: argparse.Namespace) -> None:
    """Ends the program for arguments that Hydra or torchrun would refuse on every rank, or not understand."""
    args.overrides = [word for word in args.overrides if word != "--"]
    options = [word for word in args.overrides if word.startswith("-")]
    if options:
        args.parser.error(f"unrecognized arguments: {' '.join(options)}")
    if args.config_dir is not None and not args.config_dir.is_dir():
        args.parser.error(f"argument --config-dir: expected a folder, got {str(args.config_dir)!r}")
    if args.cfg and args.info:
        args.parser.error("--cfg and --info exclude each other")
    if (args.package or args.resolve) and not args.cfg:
        args.parser.error("--package and --resolve go with --cfg only")
    if find_spec("transformers") is None and not (args.cfg or args.info):
        args.parser.error("training needs transformers, which is not installed: pip install 'ringattn[train]'")


def hydra_options(args: argparse.Namespace) -> list[str]:
    """Hydra looks into `--config-path` first, which replaces the folder that the recipe names, then `--config-dir`."""
    options = ["--config-name", args.config_name] if args.config_name else []
    if args.config_dir is None:
        return options
    return [*options, "--config-path", str(args.config_dir.resolve()), "--config-dir", str(CONFIGS)]


def printing(args: argparse.Namespace) -> list[str]:
    """Hydra's options to print something instead of a run."""
    options = ["--cfg", args.cfg] if args.cfg else []
    options += ["--info", args.info] if args.info else []
    options += ["--package", args.package] if args.package else []
    return [*options, "--resolve"] if args.resolve else options


def run_recipe(arguments: list[str]) -> None:
    """The recipe in this process, as `python recipes/train.py` runs it. It refuses by itself, with exit code 2."""
    sys.argv = [str(RECIPE), *arguments]
    runpy.run_path(str(RECIPE), run_name="__main__")


def rendezvous(args: argparse.Namespace) -> list[str]:
    """Where the ranks meet, as arguments of torchrun. Ends the program for what cannot be."""
    node_rank = args.node_rank or os.environ.get("NODE_RANK", "")
    endpoint = args.endpoint or os.environ.get("ENDPOINT", "")
    if args.nodes is None:
        # Only options count here: an environment may well have NODE_RANK for somebody else.
        if args.node_rank or args.endpoint or args.id:
            args.parser.error("missing: --nodes (or NNODES)")
        return ["--standalone"]
    absent = "" if node_rank else " --node-rank (or NODE_RANK)"
    absent += "" if endpoint else " --endpoint (or ENDPOINT)"
    if absent:
        args.parser.error(f"missing:{absent}")
    if not node_rank.isdecimal() or int(node_rank) >= args.nodes:
        args.parser.error(
            f"--node-rank must be an integer from 0 to {args.nodes - 1} for --nodes {args.nodes}, got {node_rank!r}"
        )
    if not re.fullmatch(r".+:[0-9]+", endpoint):
        args.parser.error(f"--endpoint must be HOST:PORT, got {endpoint!r}")
    # is_host is said, not guessed: torchrun compares host names, which fails in containers and for two nodes on one
    # machine.
    is_host = f"is_host={str(int(node_rank) == 0).lower()}"
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-conf", is_host]
    meeting += local_address(endpoint)
    return ["--nnodes", str(args.nodes), *meeting, "--rdzv-id", args.id or os.environ.get("JOB_ID") or "ringattn"]


def local_address(endpoint: str) -> list[str]:
    """This machine's address on its way to the endpoint, as an option of torchrun.

    torchrun would tell the other machines this one's own name, which often means the loopback, here or to them. Nothing
    is sent: connecting a datagram socket chooses the address. Where the endpoint itself is the loopback, or has no
    route yet, torchrun decides.
    """
    host, _, port = endpoint.rpartition(":")
    try:
        kind, _, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            found = str(probe.getsockname()[0])
    except OSError:
        return []
    return [] if found.startswith("127.") or found == "::1" else ["--local-addr", found]


def default_ranks() -> int:
    """One for each GPU that torch can use, else 2."""
    import torch

    gpus = torch.cuda.device_count()
    tell(f"{gpus} GPUs: {gpus or 2} ranks")
    if gpus and not installed("flash-attn-4"):
        tell("FlashAttention 4 is not installed: pip install 'ringattn[fa4]', or EXTRAS=fa4 for the launch scripts")
    return gpus or 2


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def tell(message: str) -> None:
    print(f"ringattn: {message}", file=sys.stderr)
