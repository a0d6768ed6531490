"""Whole runs through faults of disks, files and ranks that save: named, survived, and on the same curve."""

import pytest

pytest.importorskip("transformers")

from tests.training.checkpoint import faults
from tests.training.checkpoint.faults import DAMAGES, Undisturbed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Undisturbed:
    return faults.undisturbed(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["now", "in a thread"])
def test_sigkill_in_a_write_leaves_the_checkpoint_before(whole, tmp_path, asynchronous):
    facts = faults.killed_in_write(tmp_path, whole, asynchronous)
    assert facts.codes[1] == -9
    assert facts.codes[0] not in (0, None)
    assert "the connection to another rank was lost" in facts.told
    assert "from step 8" in facts.told
    assert facts.steps_lost <= faults.EVERY + 1  # a step is trained while a thread writes
    assert facts.same_curve
    assert facts.seconds < 30
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


def test_a_full_disk_costs_a_warning_and_the_run_goes_on(whole, tmp_path):
    facts = faults.failing_disk(tmp_path, whole, "ENOSPC", 12, "run.async_save=true")
    assert facts.codes == (0, 0), facts.told
    assert facts.kinds == ("failed-save", "failed-save")
    assert "warning: the checkpoint of step 8 could not be saved: rank 1: No space left on device" in facts.told
    assert "Traceback" not in facts.told
    assert facts.same_curve
    assert facts.seconds < 10
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000016"]


def test_a_disk_that_stays_read_only_stops_the_run_in_one_line(whole, tmp_path):
    facts = faults.failing_disk(tmp_path, whole, "EROFS", 99, "run.max_failed_saves=2")
    assert facts.codes == (1, 1), facts.told
    assert facts.kinds == ("failed-save", "failed-save", "rank-failed")
    assert "error: 2 saves of a checkpoint failed in a row, as many as run.max_failed_saves allows" in facts.told
    assert "Traceback" not in facts.told
    assert "from step 4" in facts.told
    assert facts.steps_lost == 8
    assert facts.same_curve


def test_the_last_save_must_not_fail(whole, tmp_path):
    codes, told, _ = faults.started(tmp_path, "run.keep=1", fault="1:ENOSPC@16")
    assert codes == (1, 1), told
    assert "error: the last checkpoint was not saved: rank 1: No space left on device" in told
    assert "Traceback" not in told
    assert "done: " not in told
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000012"]


@pytest.mark.parametrize("fault", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(whole, tmp_path, fault):
    damage, words = DAMAGES[fault]
    facts = faults.damaged(tmp_path, whole, fault, damage)
    assert facts.kinds == ("bad-checkpoint",)
    warning = next(line for line in facts.told.splitlines() if line.startswith("warning: not taken: "))
    assert words in warning
    assert "it is now step-00000012.bad" in warning
    assert facts.steps_lost == faults.EVERY
    assert facts.same_curve
    assert facts.seconds < 60
    assert (tmp_path / "checkpoints" / "step-00000012.bad").is_dir()


def test_a_corrupt_token_cache_is_named_and_made_again(tmp_path):
    facts = faults.corrupt_token_cache(tmp_path)
    assert facts.same_curve
    assert facts.told.startswith("warning: the token cache is not taken: ")
    assert "tokens.bin is damaged: its checksum is" in facts.told
    assert facts.seconds < 10


def test_copies_in_memory_lose_fewer_steps(whole, tmp_path):
    facts = faults.killed_between_saves(tmp_path, whole)
    assert facts.codes[1] == -9
    assert f"going on from the copy in memory {tmp_path / 'memory'}" in facts.told
    assert "from step 12" in facts.told
    assert facts.steps_lost <= 3
    assert facts.same_curve


def test_a_lost_machine_takes_no_steps_along(whole, tmp_path):
    facts = faults.machine_lost(tmp_path, whole)
    assert facts.codes[1] == -9
    assert f"going on from the copy in memory {tmp_path / 'memory0'}" in facts.told
    assert "from step 12" in facts.told
    assert facts.steps_lost <= 3
    assert facts.same_curve
