"""Faults in tiny runs: the rank and the cause are named in bounded time, and the curve afterwards is the undisturbed
one."""

import sys

import pytest

pytest.importorskip("transformers")

from tests.training.health import faults
from tests.training.health.faults import AT_STEP, ROWS, STEPS, Curve, Fact

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the state of other processes is in /proc"),
]
# By fault: words that what it printed and exit.json have, and the kind of its incident.
NAMED = {
    "SIGKILL of a rank in its forward pass": ("rank 1 (process", "forward pass", "killed (SIGKILL)", "rank-gone"),
    "SIGKILL of a rank in its backward pass": ("rank 1 (process", "backward pass", "killed (SIGKILL)", "rank-gone"),
    "SIGKILL of a rank in its optimizer step": ("rank 0 (process", "optimizer step", "killed (SIGKILL)", "rank-gone"),
    "SIGSTOP of a rank": ("rank 1 (process", "forward pass", "stopped by a signal", "rank-stopped"),
    "a rank that stands still": ("rank 1 waits for rank 0", "faulty.py", "in no collective", "hang"),
    "a rank that skips a collective": ("rank 1 in all_gather", "rank 0 in all_reduce", "skipped", "hang"),
    "out of memory on one rank": ("rank 1 failed", "forward pass", "memory is full", "out-of-memory"),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Curve:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    printed = faults.run_forked(output)
    assert "ringattn:" not in printed  # the monitor has nothing to say
    assert not (output / "incidents").exists()
    assert len(faults.curve(output)) == STEPS
    return faults.curve(output)


def assert_named(fact: Fact, words: tuple[str, ...]) -> None:
    assert fact.seconds is not None
    assert fact.seconds < fact.within
    for text in (fact.said, fact.printed):
        assert all(word in text for word in words), text


def assert_same(found: Curve | None, expected: Curve) -> None:
    assert found is not None
    assert [step for step, _, _ in found] == list(range(1, STEPS + 1))
    for (_, *numbers), (_, *right) in zip(found, expected, strict=True):
        assert numbers == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize("name", list(NAMED))
def test_a_fault_of_a_rank(name: str, undisturbed: Curve, tmp_path) -> None:
    fact = ROWS[name](tmp_path)
    *words, kind = NAMED[name]
    assert_named(fact, tuple(words))
    assert kind in fact.incidents
    assert fact.ending.state == "failed"
    assert fact.ending.restart is (kind != "out-of-memory")
    assert fact.steps_lost == (0 if "skips" in name else 1)
    assert_same(fact.curve, undisturbed)


@pytest.mark.parametrize("name", [name for name in ROWS if name.startswith("SIGKILL of torchrun")])
def test_ranks_end_with_torchrun(name: str, tmp_path) -> None:
    fact = ROWS[name](tmp_path)
    assert_named(fact, ("the launcher (process", "is gone"))
    assert fact.incidents == ("launcher-gone",)
    assert fact.ending.restart


def test_ranks_save_when_ringattn_train_is_killed(tmp_path) -> None:
    fact = ROWS["SIGKILL of ringattn train"](tmp_path)
    assert fact.seconds is not None
    assert fact.seconds < fact.within
    assert fact.ending.state == "stopped"


LONG_STEPS = [name for name in ROWS if name.endswith("in a long step")]
MARKS = {"SIGUSR1 in a long step": [pytest.mark.nightly]}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, [])) for name in LONG_STEPS])
def test_a_signal_in_a_long_step_loses_nothing(name: str, undisturbed: Curve, tmp_path) -> None:
    fact = ROWS[name](tmp_path)
    assert fact.ending.state == "stopped"
    assert fact.ending.restart
    assert fact.ending.step == AT_STEP  # and not one step more, for which there may be no time
    assert fact.steps_lost == 0
    assert "Traceback" not in fact.printed
    assert_same(fact.curve, undisturbed)


def test_of_two_runs_in_a_folder_one_trains(undisturbed: Curve, tmp_path) -> None:
    """Both at once, while the folder is new."""
    output = tmp_path / "out"
    slow = "slow14:1:2"  # so that the second one is out of patience before the first is done
    runs = [faults.start_forked(output, "run.hang_after=100", fault=slow) for _ in range(2)]
    faults.wait_for(lambda: any(run[0].exitcode is not None for run in runs), "neither gave way")
    refused = next(run for run in runs if run[0].exitcode is not None)
    trains = next(run for run in runs if run is not refused)
    assert refused[0].exitcode == 2
    refused[1].kill()
    for rank in (*refused, *trains):
        rank.join(faults.LIMIT)
    printed = (output / "ranks.log").read_text()
    assert [rank.exitcode for rank in trains] == [0, 0], printed
    assert f"run.output={output} is in use by another run: process {trains[0].pid} on " in printed
    assert_same(faults.curve(output), undisturbed)
    ending = faults.read_ending(output)
    assert ending is not None
    assert ending.state == "done"


def test_fewer_ranks_go_on_where_it_is_elastic(undisturbed: Curve, tmp_path) -> None:
    output = tmp_path / "out"
    sizes = ("parallel.ring=2", "run.elastic=true")
    faults.run_forked(output, *sizes, fault=f"kill-forward:1:{AT_STEP}")
    printed = faults.run_forked(output, *sizes, ranks=1)
    assert "run.elastic: parallel.ring=2 does not fit 1 ranks, and is left to them" in printed
    assert "from step 2 to" in printed
    assert_same(faults.curve(output), undisturbed)
