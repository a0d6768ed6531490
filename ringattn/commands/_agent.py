"""torchrun as `ringattn` starts it: python -m ringattn.commands._agent [options of torchrun] SCRIPT [arguments]

torchrun itself ends with a traceback and a table below what its ranks have said, whatever that was. Here a line says
which rank ended first, and how; none, if a rank refused to start and has said why.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import main as torchrun

from ringattn.commands._torchrun import tell
from ringattn.training.health import places


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code, torchrun's own: 1 whatever failed."""
    if "LOGLEVEL" not in os.environ:  # torchrun's own variable
        for name in ("api", "errors.error_handler"):  # they say what is said here, in more lines
            logging.getLogger(f"torch.distributed.elastic.multiprocessing.{name}").setLevel(logging.CRITICAL)
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        refusal = places.refusal_file(os.getpid())
        if not (refusal.exists() and refusal.stat().st_size):
            tell(how_it_ended(*error.get_first_failure()))
        return 1
    except SignalException:  # whoever sent it knows
        return 1
    return 0


def how_it_ended(rank: int, failure: ProcessFailure) -> str:
    """Of the first rank that failed, in a line."""
    code = failure.exitcode
    if code >= 0:
        return f"rank {rank} (process {failure.pid}) failed, with exit code {code}: what it said is above"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"rank {rank} (process {failure.pid}) was ended by {name}"


if __name__ == "__main__":
    sys.exit(main())
