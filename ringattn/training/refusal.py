"""How a recipe refuses to run: one message, and exit code 2."""

import os
import sys
from typing import NoReturn

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from ringattn.training.failures import report
from ringattn.training.launched import is_first, speaks_for_machine

HINT = "To append to your config use "


def refuse(error: Exception) -> NoReturn:
    """Says why, and exits with code 2.

    Rank 0 says it, and other ranks leave it to torchrun's report at the end, or without torchrun to the first rank of
    each machine: a file may be missing on one machine only.
    """
    message = _message(error)
    reported = report(message)
    if is_first(os.environ):
        print(f"error: {message}", file=sys.stderr, flush=True)
    elif not reported and speaks_for_machine(os.environ):
        print(f"error on this machine: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def _message(error: Exception) -> str:
    # Hydra's advice to add a key with "+" is right below model.config only; elsewhere it leads to the next refusal.
    lines = [
        line
        for line in str(error).splitlines()
        if not line.startswith(HINT) or line.startswith(f"{HINT}+model.config.")
    ]
    missing = isinstance(error, HydraException) and isinstance(error.__cause__, OmegaConfBaseException)
    if missing and not any(HINT in line for line in lines):
        lines.append(str(error.__cause__).splitlines()[0] + "; the keys are in configs/, each with a comment")
    return "\n".join(lines)
