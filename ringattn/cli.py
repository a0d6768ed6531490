"""The console script `ringattn`: every module of `ringattn.commands` is a sub-command."""

import argparse
import importlib
import inspect
import os
import pkgutil
import re
import signal
import sys
from collections.abc import Sequence

from ringattn import commands
from ringattn.environment import VARIABLES


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit code: 2 for wrong arguments, otherwise what the command says."""
    parser = make_parser()
    args, rest = parser.parse_known_args(join_negative(sys.argv[1:] if argv is None else argv))
    if rest and not hasattr(args, "overrides"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.overrides = rest
    try:
        for variable in VARIABLES.values():
            variable.read()
    except ValueError as error:  # every attention would raise it
        args.parser.error(str(error))
    try:
        code = args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # that is `head`, which has read enough
            print(f"{args.parser.prog}: error: {error}", file=sys.stderr)
        _give_up_stdout()
        return 1
    return code


def _give_up_stdout() -> None:
    """What cannot be written now must not be tried again at exit, with a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
