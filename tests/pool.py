"""Worker processes with torch.distributed, started once per number of ranks and used again by test after test.

    def ranks_total(x):                       # a module-level function, called in every worker
        total = torch.tensor(x + dist.get_rank())
        dist.all_reduce(total)
        return total.item()

    def test_total(pool):
        assert pool(4).run(ranks_total, 10) == [46, 46, 46, 46]

Starting workers costs up to seconds, a call costs a millisecond. In exchange workers keep state: cache
meshes at module level in the test file rather than making process groups in every call, and restore what you change.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.by_value import dumps, loads
from tests.forks import forks

START_SECONDS = 180.0
COLLECTIVE_TIMEOUT = timedelta(seconds=60)
# A rank that fails leaves the others waiting in a collective: how long they get before the pool is given up.
GRACE_SECONDS = 5.0
LOG_TAIL = 4000


def shares_devices() -> bool:
    """Whether ranks of `pool(n, "cuda")` may be more than the devices: with TESTS_SHARE_DEVICES=1. NCCL then
    takes each for a machine of its own, and sends through sockets: right or wrong shows, speed does not."""
    return os.environ.get("TESTS_SHARE_DEVICES") == "1"


Case = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments of one call


class WorkerError(RuntimeError):
    """A worker died, hung, or raised something that cannot be pickled."""


class RemoteTraceback(Exception):
    """The cause of an exception that is raised again in the test: where it came from.

    It is the cause and not a note on the exception, because `pytest.raises(match=...)` also searches notes and would
    find its pattern in the source lines of the traceback.
    """

    def __str__(self) -> str:
        return str(self.args[0])


class Pool:
    """`world_size` processes joined by gloo (`device_type="cpu"`) or by NCCL, one per device (`"cuda"`), or on the CUDA
    devices that there are, joined by gloo (`"shared"`).

    An exception on any rank is raised again in the caller, with the rank and the remote traceback as its cause. The
    workers stay if every rank raised the same type (a refusal); after anything else that is not a return on every rank
    (one rank failed alone, a worker died, time ran out) they are killed, and the next call starts new ones.
    """

    def __init__(self, world_size: int, device_type: str = "cpu") -> None:
        if device_type not in ("cpu", "cuda", "shared"):
            raise ValueError(f"device_type must be 'cpu', 'cuda' or 'shared', got {device_type!r}")
        self.world_size = world_size
        self.device_type = device_type
        self._workers: list[_Worker] = []
        self._store: dist.TCPStore | None = None
        self._logs: tempfile.TemporaryDirectory[str] | None = None

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 120.0, **kwargs: Any) -> list[Any]:
        """`fn(*args, **kwargs)` on every rank; the results in the order of ranks."""
        return self._submit(fn, [(args, kwargs)], timeout)[0]

    def run_many(self, fn: Callable[..., Any], cases: Sequence[tuple[Any, ...]], timeout: float = 120.0) -> list[Any]:
        """`fn(*case)` for every case in one exchange with the workers: for each case, the results of the ranks."""
        return self._submit(fn, [(tuple(case), {}) for case in cases], timeout)

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid or 0 for worker in self._workers]

    def close(self) -> None:
        """Ask the workers to end, and make them."""
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.connection.send_bytes(dumps(None))
        deadline = time.monotonic() + 10
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers, self._store = [], None
        if self._logs is not None:
            self._logs.cleanup()
            self._logs = None

    def _submit(self, fn: Callable[..., Any], cases: list[Case], timeout: float) -> Any:
        job = dumps(fn), dumps(cases), sys.path
        if not self._workers:
            self._start()
        try:
            for worker in self._workers:
                worker.connection.send_bytes(dumps(job))
            answers = self._collect(timeout, f"{fn.__module__}.{fn.__qualname__}")
        except BaseException:  # a KeyboardInterrupt too: answers of this call must not reach the next one
            self.kill()
            raise
        failures = [answer for answer in answers if isinstance(answer, _Failure)]
        if failures:
            if len(failures) < self.world_size or len({failure.kind for failure in failures}) > 1:
                self.kill()  # a rank that failed alone may have left messages or half a collective behind
            raise self._rebuild(failures, len(cases))
        return [list(results) for results in zip(*answers, strict=True)]

    def _start(self) -> None:
        self._logs = tempfile.TemporaryDirectory(prefix="ringattn-pool-")
        # The store lives here and binds port 0, so no port is picked that somebody else could take meanwhile.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=COLLECTIVE_TIMEOUT)
        # Beside devices they are spawned: a driver that an import has touched cannot be used in a fork.
        context: BaseContext = forks() if self.device_type == "cpu" else multiprocessing.get_context("spawn")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            log = Path(self._logs.name, f"rank{rank}.log")
            place = _Place(rank, self.world_size, self.device_type, self._store.port, log, dict(os.environ))
            process = context.Process(target=_serve, args=(place, theirs), name=f"rank{rank}", daemon=False)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours, log))
        try:
            failures = [answer for answer in self._collect(START_SECONDS, "start") if isinstance(answer, _Failure)]
        except BaseException:
            self.kill()
            raise
        if failures:
            self.kill()
            raise self._rebuild(failures, 1)

    def _collect(self, timeout: float, what: str) -> list[Any]:
        """One answer per rank. When a rank has failed, the others get only GRACE_SECONDS more."""
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        ranks = {worker.connection: rank for rank, worker in enumerate(self._workers)}
        while len(answers) < self.world_size:
            waiting = [connection for connection, rank in ranks.items() if rank not in answers]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = ranks[connection]
                try:
                    answers[rank] = loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    raise WorkerError(self._describe_death(rank, what)) from None
                if isinstance(answers[rank], _Failure):
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            if ready:
                continue
            failures = [answer for answer in answers.values() if isinstance(answer, _Failure)]
            missing = sorted(set(range(self.world_size)) - set(answers))
            if failures:  # what the others wait for is the consequence; the caller wants the cause
                return [answers.get(rank) for rank in range(self.world_size)]
            raise WorkerError(self._describe_hang(missing, what, timeout))
        return [answers[rank] for rank in range(self.world_size)]

    def _describe_death(self, rank: int, what: str) -> str:
        process = self._workers[rank].process
        process.join(5)
        code = process.exitcode
        name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return f"rank {rank} of {self.world_size} died in {what}: {name}\n{self._tail(rank)}"

    def _describe_hang(self, missing: list[int], what: str, timeout: float) -> str:
        for rank in missing:  # the workers write their stacks to their logs
            with contextlib.suppress(OSError):
                os.kill(self._workers[rank].process.pid or 0, signal.SIGUSR1)
        time.sleep(0.5)
        tails = "\n".join(f"rank {rank}:\n{self._tail(rank)}" for rank in missing)
        return f"no answer from rank {missing} of {self.world_size} within {timeout} s in {what}\n{tails}"

    def _tail(self, rank: int) -> str:
        return self._workers[rank].log.read_text(errors="replace")[-LOG_TAIL:]

    def _rebuild(self, failures: "list[_Failure]", num_cases: int) -> BaseException:
        """The exception of the rank that failed first, its cause telling about all of them."""
        first = min(failures, key=lambda failure: failure.when)
        others = [failure.rank for failure in failures if failure is not first]
        where = f"rank {first.rank} of {self.world_size}" + (f", case {first.case}" if num_cases > 1 else "")
        note = f" (rank {others} failed too)" if others else ""
        error: BaseException = WorkerError(f"{where}: {first.kind}: {first.message}")
        with contextlib.suppress(Exception):
            error = pickle.loads(first.error)
        error.__cause__ = RemoteTraceback(f"on {where}{note}:\n\n{first.trace}")
        return error


class Pools:
    """The pools of a session, one for each number of ranks: `pools(2)`, `pools(4, "cuda")`."""

    def __init__(self) -> None:
        self._pools: dict[tuple[int, str], Pool] = {}

    def __call__(self, world_size: int, device_type: str = "cpu") -> Pool:
        if device_type != "cpu":  # idle workers would hold the memory of devices that others measure
            for (size, kind), other in self._pools.items():
                if kind != "cpu" and (size, kind) != (world_size, device_type):
                    other.close()
        return self._pools.setdefault((world_size, device_type), Pool(world_size, device_type))

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    connection: Connection
    log: Path


@dataclass(frozen=True)
class _Place:
    """Where a worker belongs."""

    rank: int
    world_size: int
    device_type: str
    port: int
    log: Path
    environ: dict[str, str]


@dataclass(frozen=True)
class _Failure:
    rank: int
    case: int
    kind: str
    message: str
    error: bytes  # the exception, or nothing if it cannot be pickled
    trace: str
    when: float


def _serve(place: _Place, connection: Connection) -> None:
    """A worker's life: join the process group, then answer jobs until None or the end of the test session."""
    log = place.log.open("w", buffering=1)
    os.dup2(log.fileno(), 1)  # the test process shows them if this worker dies; the terminal belongs to pytest
    os.dup2(log.fileno(), 2)
    faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR1, log, all_threads=True)
    try:
        _join(place)
    except Exception as error:
        connection.send_bytes(dumps(_failure(place.rank, 0, error)))
        return
    connection.send_bytes(dumps(None))
    with contextlib.suppress(EOFError, ConnectionError):
        while (job := loads(connection.recv_bytes())) is not None:
            torch.set_num_threads(1)  # compilers that a job starts leave other numbers behind
            connection.send_bytes(_answer(place.rank, job))
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


def _join(place: _Place) -> None:
    os.environ.clear()
    os.environ.update(place.environ)
    rank, size = str(place.rank), str(place.world_size)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(place.port))
    if sys.platform == "linux":  # gloo would look the host's name up, which need not lead anywhere
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", place.port, is_master=False, timeout=COLLECTIVE_TIMEOUT)
    options: dict[str, Any] = {"rank": place.rank, "world_size": place.world_size, "timeout": COLLECTIVE_TIMEOUT}
    if place.device_type == "cuda":
        device = torch.device("cuda", place.rank)
        if shares_devices():  # NCCL refuses two ranks of one machine on a device, so each is a machine of its own
            device = torch.device("cuda", place.rank % torch.cuda.device_count())
            os.environ.update(NCCL_HOSTID=f"host{rank}", NCCL_IB_DISABLE="1", NCCL_SOCKET_IFNAME="lo")
            os.environ.update(LOCAL_RANK=str(device.index))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", store=store, device_id=device, **options)
    else:
        if place.device_type == "shared":
            torch.cuda.set_device(place.rank % torch.cuda.device_count())
            os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        dist.init_process_group("gloo", store=store, **options)


def _answer(rank: int, job: tuple[bytes, bytes, list[str]]) -> bytes:
    fn_bytes, cases_bytes, path = job
    case = 0
    try:
        # pytest puts folders of test files on its path as it meets them, also after this worker was started.
        sys.path.extend(folder for folder in path if folder not in sys.path)
        fn = pickle.loads(fn_bytes)
        cases = pickle.loads(cases_bytes)
        results = []
        while case < len(cases):
            args, kwargs = cases[case]
            results.append(fn(*args, **kwargs))
            case += 1
        return dumps(results)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a SystemExit too belongs to the test
        return dumps(_failure(rank, case, error))


def _failure(rank: int, case: int, error: BaseException) -> _Failure:
    trace = "".join(traceback.format_exception(error))
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)  # some exceptions can be written and not read
    except Exception:
        pickled = b""
    return _Failure(rank, case, type(error).__name__, str(error), pickled, trace, time.monotonic())
