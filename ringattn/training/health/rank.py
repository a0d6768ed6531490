"""A rank's side of its health: it writes where it is, starts the monitor of its machine, and says how it ended."""

import ctypes
import faulthandler
import json
import os
import random
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ringattn.first_failure import PeerFailed, said
from ringattn.hf.layers import decoder_layers
from ringattn.training.checkpoint.memory_copies import copies_folder
from ringattn.training.failures import FailedTogether
from ringattn.training.health import places, processes
from ringattn.training.health.endings import RECURS, ending_of, kind_of
from ringattn.training.health.incidents import Ending, read_ending, record_incident, write_ending
from ringattn.training.health.local_ranks import Watch
from ringattn.training.health.lock import Lock
from ringattn.training.health.record import Record
from ringattn.training.health.stacks import SIGNAL
from ringattn.training.start.job import Job
from ringattn.whereabouts import listen

PACKAGE = Path(__file__).parents[2]
# The package's own __init__ imports torch: a package of that name without it, so that the monitor starts at once.
_MONITOR = (
    "import sys, types; package = types.ModuleType('ringattn'); package.__path__ = [sys.argv.pop(1)]; "
    "sys.modules['ringattn'] = package; from ringattn.training.health.monitor import main; main()"
)
_PR_SET_PDEATHSIG = 1
_MEETING = "ringattn/attempt"
FLIGHT_NAMES = {
    "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE",
    "TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_PIPE_FILE",
}  # fmt: skip


class Health:
    """This rank's record, and what its loop does about it. `Health()` is one that nobody reads."""

    def __init__(self, record: Record | None = None) -> None:
        self.record = Record() if record is None else record
        self.steps, self.done = 0, False

    def in_step(self, tell: Callable[[str], None]) -> Callable[[str], None]:
        """Of a step: what it does next goes into the record too."""

        def at(what: str) -> None:
            self.record.at(what)
            tell(what)

        return at

    def watch_layers(self, model: nn.Module) -> None:
        """The record follows a model's decoder layers, forwards and backwards. Those that are compiled as a whole stay
        as they are: a hook would be traced."""
        try:
            layers = decoder_layers(model)
        except ValueError:  # none to be found: the record knows the phase alone
            return
        for number, layer in enumerate(layers):
            if getattr(layer, "_compiled_call_impl", None) is None:
                layer.register_forward_pre_hook(partial(self._entered, number))

    def _entered(self, number: int, module: nn.Module, args: Any) -> None:
        self.record.layer(number)
        if args and isinstance(args[0], torch.Tensor) and args[0].requires_grad:
            args[0].register_hook(partial(self._left, number))

    def _left(self, number: int, gradient: torch.Tensor) -> None:
        self.record.layer(number)

    def computes(self, digest: int) -> None:
        """What a step is about, below 2^64: the same on every rank."""
        self.record.computes(batch=digest)

    def joined(self) -> None:
        """Once all ranks have met: they agree on a number of this start, by which nodes know what is of it."""
        store = dist.distributed_c10d._get_default_store()
        if dist.get_rank() == 0:
            store.set(_MEETING, str(random.SystemRandom().randrange(1, 2**63)))
        self.record.computes(attempt=int(store.get(_MEETING)))

    def finished(self, steps: int, done: bool) -> None:
        """The loop has ended as it should, with a checkpoint of so many steps."""
        self.steps, self.done = steps, done


class StopRequest:
    """Notes SIGTERM, SIGINT and SIGUSR1 (what schedulers send before they take a machine) instead of dying from them.

    A second SIGINT interrupts at once. Use it as a context manager; the handlers before it come back.
    """

    def __init__(self, record: Record | None = None) -> None:
        self.requested = False
        self._record = Record() if record is None else record
        self._before: dict[int, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        self._record.told()

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._note)
        self._record.listens(True)
        return self

    def __exit__(self, *_: object) -> None:
        self._record.listens(False)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


@contextmanager
def running(job: Job, lock: Lock) -> Iterator[Health]:
    """Around a run on this rank: keeps its record, has a monitor watch it, and writes at the end how it ended.

    Arguments:
        lock: of the run's folder, on rank 0.
    """
    if job.done:
        yield Health()
        return
    agent = _end_with_launcher()
    record = _record(job, agent[0] or os.getppid())
    health = Health(record)
    listen(health.record.comes_to)
    if job.launch.local_rank == 0 and record is not None:
        try:
            _start_monitor(job, agent, lock)
        except OSError as error:  # no room for a process
            print(f"warning: this run is not watched: {error}", file=sys.stderr, flush=True)
    try:
        yield health
    except BaseException as error:
        # Of a peer that failed, it or its monitor says so.
        if not isinstance(error, PeerFailed) and (job.launch.rank == 0 or not isinstance(error, FailedTogether)):
            _write_failure(job, error)
        health.record.failed(said(error))
        raise
    else:
        if job.launch.rank == 0:
            write_ending(job.output, ending_of(health.steps, health.done))
            if job.cfg.run.report:  # its page says how it ended
                from ringattn.training.page.write import write_at_end

                write_at_end(job.output)
        health.record.at("done")
    finally:
        listen(None)
        lock.release()


def _write_failure(job: Job, error: BaseException) -> None:
    """How a run ended that this rank ends, unless another has said it before."""
    if read_ending(job.output) is None:
        step = places.newest_step(job.output)
        restart = getattr(error, "restart", not isinstance(error, RECURS))
        why = f"rank {job.launch.rank} failed: {said(error)}"
        copy = places.newest_copy(_copies(job), job.launch.ranks_here)
        write_ending(job.output, Ending("failed", restart, why, step, job.launch.rank, copy=copy if copy > step else 0))
        record_incident(job.output, kind_of(error), why, job.launch.rank, restart=restart)


def _end_with_launcher() -> tuple[int, int]:
    """torchrun's process, if it started this one, and when it began; (0, 0) for every other start.

    The kernel shall end this rank as torchrun ends: killed, it leaves its ranks to themselves. Other parents, a shell
    for one, may end before what they started.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 0
    agent = os.getppid()
    with suppress(OSError, AttributeError):  # not Linux: the monitor sees it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return agent, processes.started(agent)


def _record(job: Job, parent: int) -> Record | None:
    """The record of this rank, and its stacks on demand; None where this machine has no room for it."""
    launch = job.launch
    folder = _folder(job, parent)
    path = folder / f"{launch.local_rank}-{os.getpid()}.record"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        began = processes.started(os.getpid())
        record = Record.in_file(path, launch.rank, launch.world_size, launch.local_rank, began)
        stacks = open(path.with_suffix(".stacks"), "a")  # noqa: SIM115  open as long as the process
        faulthandler.enable(stacks)
        faulthandler.register(SIGNAL, stacks, all_threads=True, chain=False)
    except OSError as error:
        print(f"warning: this run is not watched: {folder}: {error.strerror}", file=sys.stderr, flush=True)
        return None
    record.computes(plans=_hash(str(job.cfg.parallel)))
    if job.device.type == "cuda":
        _record_flights(folder, job.output)
    return record


def _record_flights(folder: Path, output: Path) -> None:
    """Has NCCL's flight recorder run, and write into the run's folder when the monitor asks for it. What the user has
    set stays."""
    if not FLIGHT_NAMES & os.environ.keys():
        os.environ["TORCH_FR_BUFFER_SIZE"] = "2000"
        os.environ["TORCH_FR_DUMP_TEMP_FILE"] = str(places.flights(output))
        os.environ["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"] = str(places.flights_pipe(folder))


def _folder(job: Job, parent: int) -> Path:
    meeting = f"{job.launch.master_addr}:{job.launch.master_port}"
    return places.memory_folder(parent, processes.started(parent), job.output, meeting)


def _start_monitor(job: Job, agent: tuple[int, int], lock: Lock) -> None:
    launch, hang_after = job.launch, job.cfg.run.hang_after
    parent = agent[0] or os.getppid()
    used, most = (int(os.environ.get(f"TORCHELASTIC_{name}") or 0) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    watch = Watch(
        folder=str(_folder(job, parent)),
        output=str(job.output),
        node=launch.rank // launch.ranks_per_node,
        ranks_per_node=launch.ranks_per_node,
        world_size=launch.world_size,
        leader=(os.getpid(), processes.started(os.getpid())),
        agent=agent,
        hang_after=None if hang_after == "auto" else float(hang_after),
        restarts=most - used,
        lock=lock.descriptor,
        copies=str(_copies(job) or ""),
    )
    subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _MONITOR, str(PACKAGE), json.dumps(asdict(watch))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # it speaks on stderr
        start_new_session=True,
        pass_fds=[lock.descriptor] if lock.descriptor >= 0 else [],
    )


def _copies(job: Job) -> Path | None:
    """Where this machine keeps copies of the run's state between saves; None if it keeps none."""
    run = job.cfg.run
    return copies_folder(Path(run.memory_folder), job.output) if run.memory_every else None


def _hash(text: str) -> int:
    """The same in every process."""
    return zlib.crc32(text.encode())
