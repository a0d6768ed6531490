"""How a recipe refuses to run: one message, on one rank, and exit code 2."""

import os
import sys
from typing import NoReturn

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from ringattn.training.launched import is_first


def refuse(error: Exception) -> NoReturn:
    """Says why, on rank 0 only, and exits with code 2."""
    if is_first(os.environ):
        # Hydra's advice to add the key with "+" would only lead to the next refusal.
        lines = [line for line in str(error).splitlines() if not line.startswith("To append to your config")]
        if isinstance(error, HydraException) and isinstance(error.__cause__, OmegaConfBaseException):
            lines.append(str(error.__cause__).splitlines()[0] + "; the keys are in configs/, each with a comment")
        print("error: " + "\n".join(lines), file=sys.stderr, flush=True)
    sys.exit(2)
