"""The console script `ringattn`: every module of `ringattn.commands` is a sub-command."""

import argparse
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Sequence

from ringattn import commands


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit code: 2 for wrong arguments, otherwise what the command says."""
    parser = make_parser()
    args = parser.parse_args(join_negative(sys.argv[1:] if argv is None else argv))
    return args.run(args)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ringattn", description="Exact sequence-parallel attention.")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for entry in pkgutil.iter_modules(commands.__path__):
        if entry.name.startswith("_"):
            continue
        module = importlib.import_module(f"{commands.__name__}.{entry.name}")
        text = inspect.getdoc(module) or ""
        sub = subparsers.add_parser(
            entry.name,
            help=text.partition("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run, parser=sub)
    return parser


def join_negative(argv: Sequence[str]) -> list[str]:
    """`--window -1,0` as `--window=-1,0`: argparse takes the pair for an option."""
    joined: list[str] = []
    for item in argv:
        option = bool(joined) and joined[-1].startswith("--") and "=" not in joined[-1]
        if option and re.fullmatch(r"-\d[\d.]*(,-?\d+)*", item):
            joined[-1] += f"={item}"
        else:
            joined.append(item)
    return joined
