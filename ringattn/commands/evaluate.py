"""Evaluate a language model on long documents: a training run, or a saved Hugging Face model.

    ringattn evaluate model.run=outputs/tiny-stdlib 'texts.files=[/data/held-out]'
    ringattn evaluate model.path=/models/Llama-3.1-8B 'lengths=[4096,32768,131072]' 'tasks=[needle]'
    ringattn evaluate --nproc 4 model.run=outputs/long 'tasks=[needle,multi_needle,variable_tracking]'
    ringattn evaluate model.run=outputs/long 'tasks=[logprobs]' 'texts.files=[/data/held-out]'
    ringattn evaluate --cfg                          print the configuration, evaluate nothing

Starts torchrun with one rank for each GPU, or with two ranks on the CPU where there is none; all
of them share every document. Answers are scored by forward passes: an answer is right if each of
its tokens is the most probable one. What has no dashes goes to the configuration, as Hydra writes
it: key=value.

Results are JSON files and pictures in output, by default the folder evaluation/ of the run. Exit
code 0 if all tasks are done, 2 for wrong arguments, 1 if one failed.
"""

import argparse
import io
import runpy
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec

from ringattn.commands._torchrun import add_ranks, beside, torchrun
from ringattn.shipped import CONFIGS, HOME

RECIPE, CONFIG = HOME / "recipes" / "evaluate.py", CONFIGS / "evaluate.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "ringattn evaluate [options] [overrides]"
    parser.epilog = f"The configuration, with a comment on every key: {CONFIG}"
    parser.allow_abbrev = False
    parser.set_defaults(overrides=[])
    add_ranks(parser)
    parser.add_argument("--cfg", "-c", action="store_true", help="print the configuration and evaluate nothing")


def run(args: argparse.Namespace) -> int:
    overrides = [word for word in args.overrides if word != "--"]
    if options := [word for word in overrides if word.startswith("-")]:
        args.parser.error(f"unrecognized arguments: {' '.join(options)}")
    if not args.cfg:
        if find_spec("transformers") is None:
            args.parser.error("evaluation needs transformers, which is not installed: pip install 'ringattn[train]'")
        return start(args, overrides)
    run_recipe(["--cfg", "job", *overrides])
    return 0


def run_recipe(arguments: list[str]) -> None:
    """The recipe in this process. It refuses by itself, with exit code 2."""
    sys.argv = [str(RECIPE), *arguments]
    runpy.run_path(str(RECIPE), run_name="__main__")


def start(args: argparse.Namespace, overrides: list[str]) -> int:
    """Starts the ranks and waits for them; the exit code."""
    with redirect_stdout(io.StringIO()):  # a key that does not exist is said here, once, and not by ranks
        run_recipe(["--cfg", "job", *overrides])
    return beside([*torchrun(args), str(RECIPE), *overrides])
