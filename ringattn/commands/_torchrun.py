"""Ranks of this machine, started through torchrun: how many, with what environment, and where they meet."""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from ringattn.commands._call import RANKS, integer
from ringattn.shipped import HOME, INSTALLED

MEETING = "RENDEZVOUS-FILE"  # in the command of torchrun: a name that is filled in as it starts
ONE_MACHINE = (
    "--nnodes", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", MEETING, "--rdzv-conf", "store_type=file",
    "--local-addr", "127.0.0.1", "--rdzv-id", "ringattn",
)  # fmt: skip
REFUSED = 2
HANDED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """The option `--nproc`, as torchrun and as the launch scripts know it."""
    parser.add_argument(
        "--nproc",
        "--nproc-per-node",
        type=integer(RANKS),
        default=os.environ.get("NPROC") or None,
        metavar="N",
        help="ranks of this machine, default NPROC, else one for each GPU, else 2",
    )


def torchrun(args: argparse.Namespace, where: Sequence[str] = ONE_MACHINE) -> list[str]:
    """torchrun's command up to its script, with `--nproc` ranks that meet as `where` says. Sets what ranks inherit."""
    ranks = args.nproc or default_ranks()
    # torchrun would set 1; more threads than cores make CPU ranks wait for each other.
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // ranks))
    if not INSTALLED:  # a recipe finds what stands in its own folder, and not the package of its checkout
        paths = [str(HOME), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return [sys.executable, "-m", "ringattn.commands._agent", *where, "--nproc-per-node", str(ranks)]


@contextmanager
def one_machine(command: list[str]) -> Iterator[None]:
    """Ranks of one machine meet in a file, whose name is filled in here, and nothing listens to the network for them.

    torchrun's own way for one machine (--standalone) listens on all its addresses.
    """
    if MEETING not in command:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="ringattn-") as folder:
        command[command.index(MEETING)] = str(Path(folder) / "rendezvous")
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # the ranks open their own, on the loopback
        yield


def beside(command: list[str]) -> int:
    """Runs torchrun's command beside this process. The exit code: 2 if a rank refused to run, 1 if one failed.

    Signals reach torchrun, which ends its ranks, and so does the end of this process, however it comes (on Linux).
    """
    from ringattn.training.health import places
    from ringattn.training.health.launcher import ends_with_this

    signals: list[int] = []
    sys.stdout.flush()
    sys.stderr.flush()
    with one_machine(command):
        process = subprocess.Popen(command, preexec_fn=ends_with_this())
        refusal = places.refusal_file(process.pid)
        refusal.touch(mode=0o600)

        def note(number: int, _: object) -> None:
            signals.append(number)
            if number in HANDED_ON:  # Ctrl-C reaches torchrun by itself
                process.send_signal(number)

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, *HANDED_ON)}
        try:
            code = process.wait()
            refused = refusal.stat().st_size > 0
        finally:
            refusal.unlink(missing_ok=True)
            for number, handler in before.items():
                signal.signal(number, handler)
    if signals:
        return 128 + signals[0]
    return REFUSED if refused else int(code != 0)


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
