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
command goes on from its newest checkpoint. Ctrl-C, SIGTERM and SIGUSR1 save one first.

Exit code   0  all steps are done
           75  stopped by a signal, with a checkpoint: the same command goes on
            1  failed, and the same command may come further
            2  refused, or failed in a way that would happen again: something has to be changed
The same, with the reason, stands in exit.json of the run's folder.
"""

import argparse
import io
import math
import os
import re
import runpy
import socket
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ringattn.commands._call import RANKS, integer
from ringattn.commands._torchrun import ONE_MACHINE, add_ranks, one_machine, torchrun
from ringattn.shipped import CONFIGS, HOME

RECIPE = HOME / "recipes" / "train.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "ringattn train [options] [overrides]"
    parser.epilog = f"The shipped configuration, with a comment on every key: {CONFIGS}"
    parser.allow_abbrev = False  # what is added to Hydra's options later must not change the meaning of a command
    parser.set_defaults(overrides=[])
    add_ranks(parser)
    parser.add_argument(
        "--max-restarts",
        type=restarts,
        default=0,
        metavar="N",
        help="how often all ranks start again from the newest checkpoint when one fails, default 0",
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
        type=nodes,
        default=os.environ.get("NNODES") or None,
        metavar="N",
        help="machines that take part, default NNODES, else this one alone; MIN:MAX with run.elastic=true goes on with "
        "fewer, down to MIN, when machines are lost",
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
        return 0
    return start(args, arguments)


def start(args: argparse.Namespace, arguments: list[str]) -> int:
    """Starts torchrun and stays beside it: see `ringattn.training.health.launcher`. The exit code of the run."""
    from omegaconf import OmegaConf

    from ringattn.training.health.launcher import Launcher

    where = rendezvous(args)
    with redirect_stdout(io.StringIO()) as printed:  # what is wrong with the configuration is said here, once
        run_recipe(["--cfg", "job", *arguments])
    cfg = OmegaConf.create(printed.getvalue())
    grace = check_run(args, cfg)
    command = [*torchrun(args, where), *patience(grace)]
    if args.max_restarts:
        command += ["--max-restarts", str(args.max_restarts)]
    command += [str(RECIPE), *arguments]
    sys.stdout.flush()
    sys.stderr.flush()
    output = Path(cfg.run.output).expanduser().resolve()
    nodes = (int(args.node_rank or os.environ["NODE_RANK"]), args.nodes[1]) if args.nodes else None
    with one_machine(command):
        return Launcher(command, output, grace, nodes, args.max_restarts or 0).run()


def check_run(args: argparse.Namespace, cfg: Any) -> float:
    """Ends the program for what the options and the configuration exclude; the seconds that ranks have to save."""
    if args.nodes and args.nodes[0] != args.nodes[1] and cfg.run.get("elastic") is not True:
        given = f"{args.nodes[0]}:{args.nodes[1]}"
        args.parser.error(f"--nodes {given} lets a run go on with fewer machines, which needs run.elastic=true")
    grace = cfg.run.get("grace")
    if not isinstance(grace, int | float) or isinstance(grace, bool) or not grace >= 1:
        args.parser.error(f"run.grace must be a number of seconds of at least 1, got {grace!r}")
    return float(grace)


def patience(grace: float) -> list[str]:
    """For signals that reach torchrun itself, from a scheduler that sends them to every process. Before torch 2.13 its
    30 s cannot be changed."""
    from torch.distributed.run import get_args_parser

    options = [option for action in get_args_parser()._actions for option in action.option_strings]
    return ["--shutdown-timeout", str(math.ceil(grace))] if "--shutdown-timeout" in options else []


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
        return [*ONE_MACHINE]
    absent = "" if node_rank else " --node-rank (or NODE_RANK)"
    absent += "" if endpoint else " --endpoint (or ENDPOINT)"
    if absent:
        args.parser.error(f"missing:{absent}")
    least, most = args.nodes
    count = str(most) if least == most else f"{least}:{most}"
    if not node_rank.isdecimal() or int(node_rank) >= most:
        args.parser.error(f"--node-rank must be an integer from 0 to {most - 1} for --nodes {count}, got {node_rank!r}")
    if not re.fullmatch(r".+:[0-9]+", endpoint):
        args.parser.error(f"--endpoint must be HOST:PORT, got {endpoint!r}")
    # is_host is said, not guessed: torchrun compares host names, which fails in containers and for two nodes on one
    # machine.
    is_host = f"is_host={str(int(node_rank) == 0).lower()}"
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-conf", is_host]
    meeting += local_address(endpoint)
    if least != most:
        # A store of the ranks' own: that of torchrun keeps what ranks of other starts have left in it.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return ["--nnodes", count, *meeting, "--rdzv-id", args.id or os.environ.get("JOB_ID") or "ringattn"]


def restarts(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {text!r}")
    return int(text)


def nodes(text: str) -> tuple[int, int]:
    """N, or MIN:MAX."""
    least, _, most = text.partition(":")
    number = integer(RANKS)
    found = number(least), number(most or least)
    if found[0] > found[1]:
        raise argparse.ArgumentTypeError(f"expected MIN:MAX, got {text!r}")
    return found


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
