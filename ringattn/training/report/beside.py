"""Python that no step waits for, in a process of its own: a thread would take the interpreter's lock from the step."""

import os
import signal
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2]
# The package's own __init__ imports torch: a package of that name without it, so that the work begins at once.
_RUN = (
    "import importlib, os, sys, types; package = types.ModuleType('ringattn'); package.__path__ = [sys.argv.pop(1)]; "
    "sys.modules['ringattn'] = package; os.nice(10); importlib.import_module(sys.argv.pop(1)).main()"
)
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}


def beside(module: str, *given: str | Path) -> "subprocess.Popen[bytes]":
    """Starts `main()` of a module of this package that imports no torch; the steps come first. A run that is killed
    leaves it to its end.

    Arguments:
        given: what `sys.argv[1:]` is there.

    Raises OSError where there is no room for a process.
    """
    # Signals are the run's alone: what a thread blocks, the processes block that it starts.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        return subprocess.Popen(
            # Modules of the folder that the run was started in are not to be found, whatever they are called (-P).
            [sys.executable, "-P", "-c", _RUN, PACKAGE, module, *given],
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
