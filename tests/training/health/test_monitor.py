"""What a monitor decides, from records and processes that a test makes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ringattn.training.health import local_ranks, monitor, places, processes
from ringattn.training.health.incidents import read_ending, read_incidents
from ringattn.training.health.launcher import summary
from ringattn.training.health.local_ranks import Watch
from ringattn.training.health.monitor import Monitor
from ringattn.training.health.record import Record

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the state of other processes is in /proc")


class Rank:
    """A process that sleeps, and a record that says that it trains."""

    def __init__(self, folder: Path, rank: int, world_size: int = 2) -> None:
        self.process = subprocess.Popen(["sleep", "1000"])
        began = processes.started(self.process.pid)
        path = folder / f"{rank}-{self.process.pid}.record"
        own = os.getpid
        os.getpid = lambda: self.process.pid  # the record is of that process
        try:
            self.record = Record.in_file(path, rank, world_size, rank, began)
        finally:
            os.getpid = own
        self.record.begin(3)
        self.record.took(step=0.1)
        self.record.computes(attempt=5)
        self.record.at("forward pass")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[Rank]]:
    (tmp_path / "memory").mkdir()
    made = [Rank(tmp_path / "memory", rank) for rank in range(2)]
    yield made
    for one in made:
        one.end()


def watching(tmp_path: Path, hang_after: float | None = None, **changes: object) -> Monitor:
    given = {
        "folder": str(tmp_path / "memory"), "output": str(tmp_path / "out"), "node": 0, "ranks_per_node": 2,
        "world_size": 2, "leader": (os.getpid(), 0), "agent": (0, 0), "hang_after": hang_after, "restarts": 0,
        "lock": -1,
    }  # fmt: skip
    return Monitor(Watch(**given | changes))  # type: ignore[arg-type]


def test_a_rank_that_is_gone_is_named_and_the_others_are_ended(
    ranks: list[Rank], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(monitor, "LAST_WORDS", 0.1)
    watch = watching(tmp_path)
    assert watch.look()
    assert watch.judge() is None
    ranks[1].end()
    watch.run()
    assert ranks[0].process.wait(10) == -signal.SIGKILL
    ending = read_ending(tmp_path / "out")
    assert ending is not None
    assert (ending.state, ending.rank, ending.restart) == ("failed", 1, True)
    assert [one["kind"] for one in read_incidents(tmp_path / "out")] == ["rank-gone"]
    assert "rank 1 (process" in capfd.readouterr().err
    assert not (tmp_path / "memory").exists()


def test_a_copy_in_memory_that_is_newer_is_where_a_run_goes_on(
    ranks: list[Rank], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(monitor, "LAST_WORDS", 0.1)
    checkpoint = tmp_path / "out" / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "complete.json").touch()
    for rank, steps in enumerate([(5, 10), (10, 15)]):  # the copy of step 15 was not done on rank 0
        for step in steps:
            (tmp_path / "copies" / f"rank-{rank:05d}" / f"step-{step:08d}").mkdir(parents=True)
    watch = watching(tmp_path, copies=str(tmp_path / "copies"))
    assert watch.look()
    ranks[1].end()
    watch.run()
    ending = read_ending(tmp_path / "out")
    assert ending is not None
    assert (ending.step, ending.copy) == (4, 10)
    assert "the same command goes on from the copy in memory of step 10" in capfd.readouterr().err
    assert summary(ending).endswith("the same command goes on from the copy in memory of step 10")


@pytest.mark.parametrize(
    ("steps", "found"), [([], 0), ([(3,)], 0), ([(), (3,)], 0), ([(3,), (4,)], 0), ([(3, 4), (4, 3)], 4)]
)
def test_a_copy_counts_that_every_rank_of_the_machine_has(tmp_path: Path, steps: list[Any], found: int) -> None:
    for rank, own in enumerate(steps):
        (tmp_path / f"rank-{rank:05d}" / "step-00000009.partial").mkdir(parents=True)
        for step in own:
            (tmp_path / f"rank-{rank:05d}" / f"step-{step:08d}").mkdir()
    assert places.newest_copy(tmp_path, range(2)) == found
    assert places.newest_copy(None, range(2)) == 0


def test_a_rank_that_is_done_is_no_loss(ranks: list[Rank], tmp_path: Path) -> None:
    for one in ranks:
        one.record.at("done")
    watch = watching(tmp_path)
    assert watch.look()
    for one in ranks:
        one.end()
    watch.run()
    assert read_ending(tmp_path / "out") is None
    assert not (tmp_path / "memory").exists()


def test_lost_connections_wait_for_a_reason(ranks: list[Rank], tmp_path: Path) -> None:
    watch = watching(tmp_path)
    assert watch.look()
    ranks[0].record.failed("PeerFailed: the connection to another rank was lost")
    watch.look()
    assert watch.judge() is None
    ranks[1].record.failed("ArithmeticError: the fault")
    ranks[0].end()
    watch.look()
    found = watch.judge()
    assert found is not None
    assert (found.kind, found.ranks) == ("rank-failed", (1,))


def test_what_another_node_decided_counts_here(ranks: list[Rank], tmp_path: Path) -> None:
    watch = watching(tmp_path)
    assert watch.look()
    assert watch.heard() is None
    said = {"kind": "hang", "ranks": [7], "cause": "rank 7 fell behind", "restart": True}
    assert places.write_json(places.verdict_file(tmp_path / "out", 4), said)
    assert watch.heard() is None  # of another start
    assert places.write_json(places.verdict_file(tmp_path / "out", 5), said)
    found = watch.heard()
    assert found is not None
    assert (found.kind, found.ranks, found.cause) == ("hang", (7,), "rank 7 fell behind")


def test_patience_is_derived_from_steps_and_long_where_steps_say_nothing(ranks: list[Rank], tmp_path: Path) -> None:
    watch = watching(tmp_path)
    watch.look()
    one = watch.seen[0]
    assert watch.patience(one) == local_ranks.LEAST
    ranks[0].record.begin(4)
    ranks[0].record.took(step=20.0)
    ranks[0].record.at("data")
    watch.look()
    assert watch.patience(watch.seen[1]) == 200
    ranks[0].record.at("saving")
    watch.look()
    assert watch.patience(one) == local_ranks.SLOW
    assert watching(tmp_path, hang_after=7.0).look()
    quick = watching(tmp_path, hang_after=7.0)
    quick.look()
    assert quick.patience(quick.seen[1]) == 7.0


def test_a_launcher_that_is_gone_ends_the_run(ranks: list[Rank], tmp_path: Path) -> None:
    agent = subprocess.Popen(["sleep", "1000"])
    watch = watching(tmp_path, agent=(agent.pid, processes.started(agent.pid)))
    watch.look()
    assert watch.judge() is None
    agent.kill()
    agent.wait()
    found = watch.judge()
    assert found is not None
    assert found.kind == "launcher-gone"


def test_the_monitor_starts_without_torch(ranks: list[Rank], tmp_path: Path) -> None:
    from ringattn.training.health import rank

    program = rank._MONITOR.replace("import main; main()", "import main; print('torch' in sys.modules)")
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, str(rank.PACKAGE)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "False\n", done.stderr
    assert time.monotonic() - began < 30
